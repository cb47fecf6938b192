"""`api_loss` against torch's own losses and against the formulas."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apinet_head import APIOutput, api_loss, api_loss_terms


def make_output(seed=0, pairs=8, classes=5, valid_share=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    own, other = torch.randn(2, 2 * pairs, classes, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(classes, (2 * pairs,), generator=generator)
    valid = (torch.rand(pairs, generator=generator) < valid_share).repeat(2)
    return APIOutput(own.requires_grad_(), other.requires_grad_(), labels, valid, None)


def published(output, margin, rank_weight, label_smoothing):
    """The published training loop's losses, on the valid rows alone."""
    own, other, labels = (value[output.valid] for value in output[:3])
    cross_entropy = F.cross_entropy(
        torch.cat([own, other]), torch.cat([labels, labels]), label_smoothing=label_smoothing
    )
    p_own, p_other = (F.softmax(logits, 1)[torch.arange(len(labels)), labels] for logits in (own, other))
    ranking = F.margin_ranking_loss(p_own, p_other, torch.ones_like(p_own), margin=margin)
    return cross_entropy + rank_weight * ranking, cross_entropy, ranking


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 20), st.floats(0.2, 1),
    st.floats(0, 0.5), st.floats(0, 2), st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
def test_terms_and_gradients(seed, pairs, classes, valid_share, margin, rank_weight, smoothing):
    output = make_output(seed, pairs, classes, valid_share)
    if not output.valid.any():
        return
    settings_ = {"margin": margin, "rank_weight": rank_weight, "label_smoothing": smoothing}
    terms, expected = api_loss_terms(output, **settings_), published(output, *settings_.values())
    for found, right in zip(terms, expected, strict=True):
        torch.testing.assert_close(found, right)
    inputs = [output.logits_self, output.logits_other]
    for found, right in zip(
        torch.autograd.grad(terms.total, inputs), torch.autograd.grad(expected[0], inputs), strict=True
    ):
        torch.testing.assert_close(found, right)
    assert torch.equal(api_loss(output, **settings_), terms.total)


def test_gradcheck():
    output = make_output(pairs=3, valid_share=0.7)
    assert torch.autograd.gradcheck(
        lambda own, other: api_loss(APIOutput(own, other, *output[2:]), margin=0.3, label_smoothing=0.1), output[:2]
    )


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
def test_rows_that_are_not_valid_count_for_nothing(junk):
    output = make_output(pairs=6, valid_share=0.5)
    assert output.valid.any()
    assert not output.valid.all()
    spoilt = [logits.detach().masked_fill(~output.valid[:, None], junk).requires_grad_() for logits in output[:2]]
    labels = output.labels.masked_fill(~output.valid, -100)
    loss = api_loss(APIOutput(*spoilt, labels, *output[3:]))
    torch.testing.assert_close(loss, api_loss(output))
    loss.backward()
    for logits in spoilt:
        assert logits.grad.isfinite().all()
        assert (logits.grad[~output.valid] == 0).all()


def test_no_valid_row_gives_zero_with_zero_gradients():
    output = make_output(valid_share=0.0)
    terms = api_loss_terms(output, label_smoothing=0.1)
    assert [term.item() for term in terms] == [0, 0, 0]
    terms.total.backward()
    assert (output.logits_self.grad == 0).all()
    assert (output.logits_other.grad == 0).all()


def test_no_rows_at_all():
    empty = torch.zeros(0, 5, requires_grad=True)
    assert api_loss(APIOutput(empty, empty, torch.zeros(0).long(), torch.zeros(0).bool(), None)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    half = make_output(dtype=dtype)
    same = APIOutput(half.logits_self.double(), half.logits_other.double(), *half[2:])
    loss = api_loss(half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), api_loss(same), rtol=1e-5, atol=1e-6)


def test_autocast_keeps_the_loss_in_float32():
    output = make_output(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(api_loss(output), api_loss(output).float())
        inside = api_loss(output)
    torch.testing.assert_close(inside, api_loss(output))


def test_large_logits_stay_finite():
    own, other = torch.full((2, 3), 1e4), torch.full((2, 3), -1e4)
    own[:, 0] = -1e4
    loss = api_loss(APIOutput(own, other, torch.zeros(2).long(), torch.ones(2).bool(), None))
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_other": torch.zeros(16, 4)}, r"float64 \[16, 5\].*float32 \[16, 4\]"),
        ({"labels": torch.zeros(8).long()}, r"labels and valid must be \[2P\].*int64 \[8\]"),
        ({"valid": torch.ones(15).bool()}, r"bool \[15\]"),
    ],
)
def test_errors_show_what_came(change, message):
    with pytest.raises(ValueError, match=message):
        api_loss(make_output()._replace(**change))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_label_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match=rf"\[0, 1\], got {smoothing}"):
        api_loss(make_output(), label_smoothing=smoothing)
