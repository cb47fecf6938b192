"""Gated features and their backward pass, which is written by hand, against autograd of the formulas."""

import pytest
import torch
from footprint import saved_bytes
from torch.autograd import forward_ad, grad

from apinet_head._gating import gated_features

SINGLE = pytest.mark.parametrize("single", [False, True])


def make_case(dtype=torch.float64, mutual_dtype=None, images=5, pairs=7, dim=3):
    torch.manual_seed(0)
    table = torch.randn(images, dim, dtype=dtype, requires_grad=True)
    mutual = torch.randn(pairs, dim, dtype=mutual_dtype or dtype, requires_grad=True)
    return table, torch.randint(images, (2, pairs)), mutual  # rows of the table are in several pairs


def by_formula(table, rows, mutual, single):
    """Equations 2 and 3, a pair at a time: own gates of anchors and partners, then other gates."""
    own, other = ([], []), ([], [])
    for a, b, m in zip(*rows, mutual, strict=True):
        x = table[a], table[b]
        g = [torch.sigmoid(m if single else m * one) for one in x]
        for side in (0, 1):
            own[side].append(x[side] + x[side] * g[side])
            other[side].append(x[side] + x[side] * g[1 - side])
    groups = [own] if single else [own, other]
    return torch.stack([torch.stack([*anchors, *partners]) for anchors, partners in groups])


@SINGLE
@pytest.mark.parametrize("pairs", [1, 7])
def test_values_and_derivatives_are_those_of_the_formulas(single, pairs):
    table, rows, mutual = make_case(pairs=pairs)
    found, expected = (function(table, rows, mutual, single) for function in (gated_features, by_formula))
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found).transpose(1, 2).contiguous().transpose(1, 2)  # as a gradient may come: strided
    gradients = grad((expected * weight).sum(), (table, mutual))
    torch.testing.assert_close(grad((found * weight).sum(), (table, mutual)), gradients)
    alone = gated_features(table, rows, mutual.detach(), single)
    torch.testing.assert_close(grad((alone * weight).sum(), table), gradients[:1])

    tangents = torch.randn_like(table), torch.randn_like(mutual)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, (table, mutual), tangents)
        found = forward_ad.unpack_dual(gated_features(next(duals), rows, next(duals), single)).tangent
    _, expected = torch.func.jvp(lambda *x: by_formula(x[0], rows, x[1], single), (table, mutual), tangents)
    torch.testing.assert_close(found, expected)


@SINGLE
def test_second_derivatives_are_those_of_finite_differences(single):
    table, rows, mutual = make_case()
    arguments = lambda table, mutual: gated_features(table, rows, mutual, single), (table, mutual)
    assert torch.autograd.gradcheck(*arguments)
    assert torch.autograd.gradgradcheck(*arguments)


@SINGLE
@pytest.mark.parametrize("mutual_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_what_came(single, mutual_dtype):
    # Under autocast the features are float32 where the backbone ends in one, and the MLP returns bfloat16.
    table, rows, mutual = make_case(torch.float32, mutual_dtype)
    found = grad(gated_features(table, rows, mutual, single).square().sum(), (table, mutual))
    assert [gradient.dtype for gradient in found] == [torch.float32, mutual_dtype]
    exact = [value.detach().double().requires_grad_() for value in (table, mutual)]
    expected = grad(by_formula(exact[0], rows, exact[1], single).square().sum(), exact)
    torch.testing.assert_close([gradient.double() for gradient in found], [*expected], rtol=2e-2, atol=2e-2)


@SINGLE
def test_the_arguments_are_all_that_is_kept(single):
    table, rows, mutual = make_case(images=20, pairs=40, dim=256)
    found, _ = saved_bytes(lambda: gated_features(table, rows, mutual, single).sum(), [table])
    assert found == mutual.nbytes + rows.nbytes


@SINGLE
def test_no_pairs_have_gradients_of_zero(single):
    table, rows, mutual = make_case(pairs=0)
    of_table, of_mutual = grad(gated_features(table, rows, mutual, single).sum(), (table, mutual))
    assert not of_table.any()
    assert of_mutual.shape == (0, 3)
