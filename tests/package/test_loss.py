"""`api_loss` against torch's own losses; rows that do not count are in test_fuzz.py and test_linear_loss.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from apinet_head import APIHead, APILoss, APIOutput, api_loss, api_loss_terms


def make_output(seed=0, pairs=8, classes=5, valid_share=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    own, other = torch.randn(2, 2 * pairs, classes, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(classes, (2 * pairs,), generator=generator)
    valid = (torch.rand(pairs, generator=generator) < valid_share).repeat(2)
    return APIOutput(own.requires_grad_(), other.requires_grad_(), labels, valid, None)


def published(output, margin, rank_weight, label_smoothing, class_weight=None):
    """The published training loop's losses, on the valid rows alone."""
    own, other, labels = (value[output.valid] for value in output[:3])
    cross_entropy = F.cross_entropy(
        torch.cat([own, other]), torch.cat([labels, labels]), weight=class_weight, label_smoothing=label_smoothing
    )
    p_own, p_other = (F.softmax(logits, 1)[torch.arange(len(labels)), labels] for logits in (own, other))
    ranking = F.margin_ranking_loss(p_own, p_other, torch.ones_like(p_own), margin=margin)
    return cross_entropy + rank_weight * ranking, cross_entropy, ranking


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 20), st.floats(0.2, 1),
    st.floats(0, 0.5), st.floats(0, 2), st.sampled_from([0.0, 0.1, 1.0]), st.booleans(),
)  # fmt: skip
def test_terms_and_gradients_are_those_of_torchs_losses(
    seed, pairs, classes, valid_share, margin, rank_weight, smoothing, weighted
):
    output = make_output(seed, pairs, classes, valid_share)
    if not output.valid.any():
        return
    weight = torch.linspace(0, 1, classes + 1, dtype=torch.float64)[1:] if weighted else None
    settings_ = {"margin": margin, "rank_weight": rank_weight, "label_smoothing": smoothing, "class_weight": weight}
    terms, expected = api_loss_terms(output, **settings_), published(output, *settings_.values())
    torch.testing.assert_close([*terms], [*expected])
    inputs = [output.logits_self, output.logits_other]
    torch.testing.assert_close(torch.autograd.grad(terms.total, inputs), torch.autograd.grad(expected[0], inputs))
    assert torch.equal(api_loss(output, **settings_), terms.total)
    module = APILoss(**settings_)
    assert torch.equal(module(output), terms.total)
    assert all(map(torch.equal, module.terms(output), terms))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    half = make_output(dtype=dtype)
    same = APIOutput(half.logits_self.double(), half.logits_other.double(), *half[2:])
    loss = api_loss(half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), api_loss(same), rtol=1e-5, atol=1e-6)


def test_class_weight_is_a_buffer_as_in_cross_entropy_loss():
    loss = APILoss(class_weight=torch.rand(5))
    assert list(loss.state_dict()) == ["class_weight"]
    assert list(loss.parameters()) == []
    assert loss.double().class_weight.dtype == torch.float64
    assert list(APILoss().state_dict()) == []


def test_features_are_not_taken_for_logits():
    head = APIHead(8, hidden_dim=4)
    x, y = torch.randn(8, 8), torch.arange(8) // 2
    for loss in (api_loss, api_loss_terms, APILoss()):
        with pytest.raises(ValueError, match=r"no classifier.*float32 \[32, 8\].*num_classes=.*classifier="):
            loss(head(x, y))
    assert api_loss(head(x, y, classifier=torch.nn.Linear(8, 4))).isfinite()


# What is no number, share or weight in `api_loss` is in test_fuzz.py.
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_weight": [1.0, 2.0]}, TypeError, r"class_weight must be a tensor \[C\].*\[1.0, 2.0\]"),
        ({"class_weight": torch.ones(5, 1)}, ValueError, r"must be \[C\].*float32 \[5, 1\]"),
        ({"margin": "0.05"}, TypeError, r"margin must be a number"),
        ({"label_smoothing": 1.1}, ValueError, r"\[0, 1\], got 1.1"),
        ({"rows": 0}, ValueError, "rows must be at least 1, got 0"),
        ({"rows": 2.5}, TypeError, "rows must be an int, got 2.5"),
        ({"rows": True}, TypeError, "rows must be an int, got True"),
    ],
)
def test_settings_are_checked_as_the_module_is_made(arguments, error, message):
    with pytest.raises(error, match=message):
        APILoss(**arguments)
