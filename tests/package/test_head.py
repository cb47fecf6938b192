"""`APIHead` against the formulas written out pair by pair."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apinet_head import APIHead, APILoss, Pairs, api_loss, api_loss_terms, mine_pairs


def make_case(seed=0, size=12, dim=10, classes=4, **head_args):
    """A float64 head without dropout, features and labels in [0, classes)."""
    torch.manual_seed(seed)
    head_args = {"hidden_dim": 6, "dropout": 0.0, "dtype": torch.float64, **head_args}
    return APIHead(dim, classes, **head_args), torch.randn(size, dim, dtype=torch.float64), torch.arange(size) % classes


@pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 12), st.integers(1, 4), st.floats(0, 0.3))
def test_logits_loss_and_gradients_follow_the_formulas(seed, size, dim, classes, margin):
    classes = min(classes, size)
    head, features, labels = make_case(seed, size, dim, classes)
    output = head(features.requires_grad_(), labels)
    terms = api_loss_terms(output, margin=margin)
    pairs = mine_pairs(features, labels)
    if not pairs.valid.any():
        return
    # The published method knows no pairs that are not valid: they are to be as if they weren't there.
    expected = reference.head(head, features, labels, list(pairs.partner.view(2, -1)), margin, pairs.valid)
    torch.testing.assert_close(output.logits_self[output.valid], expected["own"])
    torch.testing.assert_close(output.logits_other[output.valid], expected["other"])
    for name in ("cross_entropy", "ranking"):
        torch.testing.assert_close(getattr(terms, name), expected[name])
    inputs = [features, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(terms.total, inputs), torch.autograd.grad(expected["loss"], inputs))


@pytest.mark.parametrize("training", [True, False])
def test_labels_decide_what_comes_back_not_the_mode(training):
    head, features, labels = make_case()
    head.train(training)
    assert torch.equal(head(features), head.classifier(features))
    assert head(features, labels).logits_self.shape == (48, 4)


def test_dropout_is_for_training_only():
    head, features, labels = make_case(dropout=0.5)
    assert not torch.equal(head(features, labels).logits_self, head(features, labels).logits_self)
    assert not torch.equal(head(features), head(features))
    head.eval()
    assert torch.equal(head(features, labels).logits_self, head(features, labels).logits_self)
    assert torch.equal(head(features), head.classifier(features))


def test_without_classes_the_features_come_back():
    head, (_, features, labels) = APIHead(10, mutual="sum"), make_case()
    assert list(head.parameters()) == []
    assert head(features) is features
    assert head(features, labels).logits_self.shape == (48, 10)


def test_a_classifier_given_at_call_time_is_used():
    head, features, labels = make_case()
    bare = APIHead(10, hidden_dim=6, dropout=0, dtype=torch.float64)
    bare.mutual.load_state_dict(head.mutual.state_dict())
    torch.testing.assert_close(bare(features, classifier=head.classifier), head(features))
    expected = head(features, labels)
    torch.testing.assert_close(bare(features, labels, classifier=head.classifier)[:2], expected[:2])
    torch.testing.assert_close(head.classifier(bare(features, labels).logits_other), expected.logits_other)


def test_intra_and_inter_of_the_head_choose_the_pairs():
    head, features, labels = make_case(intra="dissimilar", inter=None)
    expected = mine_pairs(features, labels, intra="dissimilar", inter=None)
    torch.testing.assert_close([*head(features, labels).pairs], [*expected], rtol=0, atol=0)


def test_keys_equal_the_batch_they_hold():
    head, features, labels = make_case(size=10)
    more = torch.randn(7, 10, dtype=torch.float64)
    keys, key_labels = torch.cat([more, features]), torch.cat([torch.arange(7) % 4, labels])
    output = head(features, labels, keys=keys, key_labels=key_labels, key_offset=7)
    pairs = output.pairs
    whole = head(keys, key_labels, pairs=Pairs(pairs.anchor + 7, *pairs[1:]))
    assert (pairs.partner < 7).any(), "no partner among the further keys: this tests nothing"
    torch.testing.assert_close(output[:4], whole[:4])
    torch.testing.assert_close(head.gates(features, pairs, keys=keys), head.gates(keys, whole.pairs))


def test_non_finite_key_of_a_pair_that_does_not_exist_leaves_gradients_alone():
    head, features, labels = make_case(size=4)
    keys = torch.full((3, 10), float("nan"), dtype=torch.float64)
    output = head(features, labels, keys=keys, key_labels=torch.full((3,), -1))
    assert not output.valid.any()
    loss = api_loss(output)
    loss.backward()
    assert loss == 0
    assert all((parameter.grad == 0).all() for parameter in head.parameters())


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_images_without_a_class_hold_leaves_gradients_alone(value, elsewhere, rows):
    head, features, labels = make_case(size=8)
    labels[2] = -1
    gradients = []
    for held in (0.5, value):
        batch = features.detach().index_fill(0, torch.tensor(2), held).requires_grad_()
        keys = {"keys": batch.detach(), "key_labels": labels, "key_offset": 0} if elsewhere else {}
        loss = head(batch, labels, criterion=APILoss(rows=rows), **keys).total
        gradients.append([loss, *torch.autograd.grad(loss, [batch, *head.parameters()])])
    torch.testing.assert_close(*gradients)


def test_state_dict_names_are_the_contract():
    head, _, _ = make_case()
    assert sorted(head.state_dict()) == sorted(
        f"{layer}.{part}" for layer in ("mutual.fc1", "mutual.fc2", "classifier") for part in ("weight", "bias")
    )
    assert isinstance(head.drop, nn.Dropout)
    assert isinstance(head.mutual.drop, nn.Dropout)


def test_initialisation_is_torchs_default():
    torch.manual_seed(3)
    head = APIHead(10, 4, hidden_dim=6)
    torch.manual_seed(3)
    torch.testing.assert_close(
        [*head.parameters()],
        [p for layer in (nn.Linear(20, 6), nn.Linear(6, 10), nn.Linear(10, 4)) for p in layer.parameters()],
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_stays_near_float64(dtype):
    head, features, labels = make_case(size=24, dim=32, classes=6)
    expected = api_loss(head(features, labels))
    found = api_loss(head.to(dtype)(features.to(dtype), labels, pairs=mine_pairs(features, labels)))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


X, Y = torch.zeros(4, 10), torch.zeros(4, dtype=torch.long)
HEAD = APIHead(10, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HEAD(torch.zeros(4, 9)), r"\[B, 10\].*float32 \[4, 9\].*dim=9"),
        (lambda: HEAD(X, keys=X), r"need labels"),
        (lambda: HEAD(X, Y, keys=X), r"keys and key_labels need each other.*only keys"),
        (lambda: HEAD(X, Y, key_labels=Y, pairs=mine_pairs(X, Y)), r"need each other.*only key_labels"),
        (lambda: HEAD(X, Y, key_offset=0), r"key_offset needs both, got only key_offset"),
        (lambda: HEAD(X, Y, pairs=mine_pairs(X.to("meta"), Y.to("meta"))), r"pairs.anchor.*one device"),
        (lambda: APIHead(10, mutual="individual", gate="single"), r"'individual' has none"),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()
