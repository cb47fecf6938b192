"""`APIHead` against the formulas written out pair by pair."""

import warnings

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apinet_head import APIHead, APILoss, Pairs, api_loss, api_loss_terms, mine_pairs, random_pairs


def make_case(seed=0, size=12, dim=10, classes=4, **head_args):
    """A float64 head without dropout, features and labels in [0, classes)."""
    torch.manual_seed(seed)
    head_args = {"hidden_dim": 6, "dropout": 0.0, "dtype": torch.float64, **head_args}
    return APIHead(dim, classes, **head_args), torch.randn(size, dim, dtype=torch.float64), torch.arange(size) % classes


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 12), st.integers(1, 4), st.floats(0, 0.3))
def test_logits_loss_and_gradients_follow_the_formulas(seed, size, dim, classes, margin):
    classes = min(classes, size)
    head, features, labels = make_case(seed, size, dim, classes)
    output = head(features.requires_grad_(), labels)
    terms = api_loss_terms(output, margin=margin)
    pairs = mine_pairs(features, labels)
    if not pairs.valid.all():
        return  # the published method knows no such pair; test_invalid_pairs_are_masked_out has them
    expected = reference.head(head, features, labels, list(pairs.partner.view(2, -1)), margin)
    torch.testing.assert_close(output.logits_self, expected["own"])
    torch.testing.assert_close(output.logits_other, expected["other"])
    for name in ("cross_entropy", "ranking"):
        torch.testing.assert_close(getattr(terms, name), expected[name])
    inputs = [features, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(terms.total, inputs), torch.autograd.grad(expected["loss"], inputs))


def test_gradients_are_those_of_finite_differences():
    head, features, labels = make_case(size=6, dim=5, classes=3)
    pairs = mine_pairs(features, labels)
    names = [name for name, _ in head.named_parameters()]

    def loss(x, *parameters):
        output = torch.func.functional_call(
            head, dict(zip(names, parameters, strict=True)), (x, labels), {"pairs": pairs}
        )
        return api_loss(output, margin=0.2, label_smoothing=0.1)

    inputs = [value.detach().clone().requires_grad_() for value in (features, *head.parameters())]
    assert torch.autograd.gradcheck(loss, inputs)


def test_rows_belong_to_anchors_then_partners():
    head, features, labels = make_case()
    output = head(features, labels)
    pairs = output.pairs
    assert output.logits_self.shape == output.logits_other.shape == (48, 4)
    assert torch.equal(output.labels, torch.cat([labels[pairs.anchor], labels[pairs.partner]]))
    assert torch.equal(output.valid, pairs.valid.repeat(2))
    gate_anchor, gate_partner = head.gates(features, pairs)
    assert gate_anchor.shape == gate_partner.shape == (24, 10)
    assert ((gate_anchor > 0) & (gate_anchor < 1)).all()
    partner = features[pairs.partner]
    torch.testing.assert_close(output.logits_self[24:], head.classifier(partner + partner * gate_partner))
    torch.testing.assert_close(output.logits_other[24:], head.classifier(partner + partner * gate_anchor))


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
    torch.manual_seed(0)
    head, features, labels = APIHead(10, dropout=0.5), torch.randn(12, 10), torch.arange(12) % 4
    assert head(features) is features
    output = head(features, labels)
    assert output.logits_self.shape == output.logits_other.shape == (48, 10)


def test_a_classifier_given_at_call_time_is_used():
    head, features, labels = make_case()
    bare = APIHead(10, hidden_dim=6, dropout=0, dtype=torch.float64)
    bare.mutual.load_state_dict(head.mutual.state_dict())
    for with_own, with_head in (
        (bare(features, labels, classifier=head.classifier), head(features, labels)),
        ([bare(features, classifier=head.classifier)], [head(features)]),
    ):
        torch.testing.assert_close(with_own[0], with_head[0])
    gated = bare(features, labels)
    torch.testing.assert_close(head.classifier(gated.logits_other), head(features, labels).logits_other)


def test_given_pairs_override_mining():
    head, features, labels = make_case()
    pairs = random_pairs(labels, 5)
    output = head(features, labels, pairs=pairs)
    assert output.logits_self.shape == (10, 4)
    assert output.pairs is pairs


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


def test_invalid_pairs_are_masked_out():
    head, features, labels = make_case(size=7)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3])  # classes 2 and 3 have one image each
    output = head(features, labels)
    assert (~output.valid).sum() == 4
    pairs = Pairs(*(field[output.pairs.valid] for field in output.pairs))
    torch.testing.assert_close(api_loss(output), api_loss(head(features, labels, pairs=pairs)))


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


def test_device_and_dtype_reach_the_parameters():
    head = APIHead(10, 4, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}


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
        (lambda: HEAD(torch.zeros(4, 10, 7, 7)), r"\[4, 10, 7, 7\].*pool it first"),
        (lambda: HEAD(X.double()), r"one dtype outside autocast.*float64 \[4, 10\].*float32"),
        (lambda: HEAD(X.to("meta")), r"one device.*meta"),
        (lambda: HEAD(X, Y.float()), r"integer.*float32 \[4\]"),
        (lambda: HEAD(X, Y[:2]), r"one entry per row.*\[2\].*\[4, 10\]"),
        (lambda: HEAD(X, keys=X), r"need labels"),
        (lambda: HEAD(X, Y, keys=X), r"keys and key_labels need each other.*only keys"),
        (lambda: HEAD(X, Y, key_labels=Y, pairs=mine_pairs(X, Y)), r"need each other.*only key_labels"),
        (lambda: HEAD(X, Y, key_offset=0), r"key_offset needs both, got only key_offset"),
        (lambda: HEAD(X, Y, pairs=mine_pairs(X.to("meta"), Y.to("meta"))), r"pairs.anchor.*one device"),
        (lambda: APIHead(10, mutual="attention"), r"mutual must be a module or one of 'mlp'.*'attention'"),
        (lambda: APIHead(10, gate="triple"), r"gate must be 'pair' or 'single', got 'triple'"),
        (lambda: APIHead(10, mutual="individual", gate="single"), r"'individual' has none"),
        (lambda: APIHead(10, intra="nearest"), r"intra must be one of.*'nearest'"),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_features_that_are_not_finite_are_no_lack_of_images():
    labels = torch.arange(12) // 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        APIHead(8, 3)(torch.full((12, 8), torch.nan), labels)
