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
    """Equations 2 and 3: anchors and partners under their own gates, then under each other's."""
    a, b = table[rows]
    gate_a, gate_b = (torch.sigmoid(mutual if single else mutual * x) for x in (a, b))
    own, other = torch.cat([a + a * gate_a, b + b * gate_b]), torch.cat([a + a * gate_b, b + b * gate_a])
    return own[None] if single else torch.stack([own, other])


@SINGLE
@pytest.mark.parametrize("pairs", [0, 1, 7])
def test_values_and_derivatives_are_those_of_the_formulas(single, pairs):
    table, rows, mutual = make_case(pairs=pairs)
    strided = torch.randn_like(by_formula(table, rows, mutual, single).mT.contiguous()).mT  # as a gradient may come
    weight, tangents = strided.requires_grad_(), (torch.randn_like(table), torch.randn_like(mutual))
    of_both = []
    for function in (gated_features, by_formula):
        gated = function(table, rows, mutual, single)
        first = grad((gated * weight).sum(), (table, mutual), create_graph=True)
        second = grad(sum(one.square().sum() for one in first), (table, mutual, weight))
        (alone,) = grad((function(table, rows, mutual.detach(), single) * weight).sum(), table)
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, (table, mutual), tangents)
            forward = forward_ad.unpack_dual(function(next(duals), rows, next(duals), single)).tangent
        of_both.append([gated, *first, *second, alone, forward])
    torch.testing.assert_close(*of_both)


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
