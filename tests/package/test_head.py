"""`APIHead`: the formulas, criteria, images without a class, the look at the first batch, a memory, devices, errors."""

import copy
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from footprint import saved_bytes
from heads import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import no_warnings

from apinet_head import APIHead, FeatureMemory, api_loss, api_loss_terms, mine_pairs, random_pairs
from apinet_head.loss import APILoss, LossTerms
from apinet_head.mutual import MUTUALS

DIM, CLASSES = 9, 5
pytestmark = pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
assert_near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
GATES = pytest.mark.parametrize("gate", ["pair", "single"])
SOME_LABEL = st.sampled_from([0, -1, -100])
VARIANTS = [
    *itertools.product(MUTUALS, ["pair"]),
    *((mutual, "single") for mutual in MUTUALS if mutual != "individual"),
]


def gradients(loss, head, features):
    return torch.autograd.grad(loss, [*head.parameters(), features], retain_graph=True)


@pytest.mark.parametrize(("mutual", "gate"), VARIANTS)
@settings(max_examples=75, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 14), st.integers(1, 12), st.integers(1, 4), st.floats(0, 0.3), SOME_LABEL)
def test_logits_loss_and_gradients_follow_the_formulas(mutual, gate, seed, size, dim, classes, margin, label):
    head, features, labels = make_case(size, dim, min(classes, size), seed, mutual=mutual, gate=gate)
    labels[torch.rand(size) < 0.2] = label
    output, pairs = head(features, labels), mine_pairs(features, labels)
    if not pairs.valid.any():
        return
    # The published method knows no pairs that are not valid: they are to be as if they weren't there.
    how = margin, pairs.valid, mutual, gate == "single"
    expected = reference.head(head, features, labels, list(pairs.partner.view(2, -1)), *how)
    assert (output.logits_other is output.logits_self) == (gate == "single")
    assert_near([logits[output.valid] for logits in output[:2]], [expected[name] for name in ("own", "other")])
    for terms in (api_loss_terms(output, margin=margin), head(features, labels, criterion=APILoss(margin, rows=4))):
        assert_near([*terms], [expected[name] for name in ("loss", "cross_entropy", "ranking")])
        assert_near(*(gradients(loss, head, features) for loss in (terms.total, expected["loss"])))


# The published head: see golden/README.md.
PUBLISHED = {"map1": "mutual.fc1", "map2": "mutual.fc2", "fc": "classifier"}
WEIGHTS = {f"{old}_{part}": f"{new}.{part}" for old, new in PUBLISHED.items() for part in ("weight", "bias")}


@pytest.mark.parametrize("name", ["case_a", "case_b"])
def test_pairs_logits_loss_and_gradients_are_the_published_ones(name):
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as arrays:
        case = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    (classes, dim), hidden_dim = case["fc_weight"].shape, len(case["map1_bias"])
    head = APIHead(dim, classes, hidden_dim=hidden_dim, dropout=0, dtype=torch.float64)
    head.load_state_dict({new: case[old] for old, new in WEIGHTS.items()})
    features = case["features"].requires_grad_()
    output = head(features, case["labels"])
    terms = api_loss_terms(output)
    terms.total.backward()

    assert output.pairs.valid.all()
    assert torch.equal(output.pairs.partner, torch.cat([case["intra_partner"], case["inter_partner"]]))
    assert torch.equal(output.labels, case["row_labels"])
    found = {"logits_self": output.logits_self, "logits_other": output.logits_other, "grad_features": features.grad}
    found |= {"loss": terms.total, "cross_entropy": terms.cross_entropy, "ranking": terms.ranking}
    found |= {f"grad_{old}": head.get_parameter(new).grad for old, new in WEIGHTS.items()}
    found |= {"eval_logits": head.eval()(features)}
    for name, value in found.items():
        torch.testing.assert_close(value, case[name], rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("training", [True, False])
def test_labels_decide_what_comes_back_and_the_mode_whether_there_is_dropout(training):
    head, features, labels = make_case(dropout=0.5)
    head.train(training)
    calls = [lambda: head(features), lambda: head(features, labels).logits_self]
    assert [call().shape for call in calls] == [(12, CLASSES), (48, CLASSES)]
    assert [torch.equal(call(), call()) for call in calls] == [not training] * 2
    assert torch.equal(head(features), head.classifier(features)) == (not training)
    head.classifier = nn.Identity()
    assert head(features) is features


@GATES
def test_a_classifier_is_called_once_on_all_rows(gate):
    head, features, labels = make_case(gate=gate)
    bare, classifier, calls = copy.deepcopy(head), head.classifier, []
    bare.classifier = nn.Identity()
    expected = [classifier(gated) for gated in bare(features, labels)[:2]]
    classifier.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    torch.testing.assert_close([*head(features, labels)[:2]], expected)
    torch.testing.assert_close([*bare(features, labels, classifier=classifier)[:2]], expected)
    assert calls == [96 if gate == "pair" else 48] * 2


def test_initialisation_is_torchs_default():
    parameters = []
    for layers in (lambda: [APIHead(10, 4, hidden_dim=6)], lambda: map(nn.Linear, (20, 6, 10), (6, 10, 4))):
        torch.manual_seed(3)
        parameters.append([parameter for layer in layers() for parameter in layer.parameters()])
    torch.testing.assert_close(*parameters, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [None, 1, 7, 1000])
@GATES
@pytest.mark.parametrize("own", [False, True])
def test_a_criterion_gives_the_terms_of_the_loss(rows, gate, own):
    head, features, labels = make_case(gate=gate, dropout=0.5)
    layers = nn.Sequential(nn.Linear(DIM, 7, dtype=torch.float64), nn.Tanh())
    criterion, classifier = APILoss(margin=0.2, rank_weight=0.7, rows=rows), layers.forward if own else None
    torch.manual_seed(1)
    terms = head(features, labels, criterion=criterion, classifier=classifier)
    torch.manual_seed(1)
    expected = criterion.terms(head(features, labels, classifier=classifier))
    assert isinstance(terms, LossTerms)
    torch.testing.assert_close([*terms], [*expected], rtol=0, atol=1e-12)
    of_both = (gradients(loss.total, head.mutual, features) for loss in (terms, expected))
    torch.testing.assert_close(*of_both, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("num_keys", [0, 1, 8])  # the first images of the batch, of which the very first has no class
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_images_without_a_class_hold_leaves_gradients_alone(value, num_keys, rows):
    head, features, labels = make_case(size=8)
    labels[0], found = -1, []
    for held in (0.5, value):
        batch = features.detach().index_fill(0, torch.tensor(0), held).requires_grad_()
        keys = {"keys": batch.detach()[:num_keys], "key_labels": labels[:num_keys]} if num_keys else {}
        loss = head(batch, labels, criterion=APILoss(rows=rows), **keys).total
        found.append([loss, *gradients(loss, head, batch)])
    torch.testing.assert_close(*found)
    assert found[0][0].any() == (num_keys != 1)


# The look at the first batch.

SHUFFLED, BALANCED, ZEROS = torch.arange(32), torch.arange(32) // 4, torch.zeros(8, dtype=torch.long)


@pytest.mark.parametrize("labels", [SHUFFLED, ZEROS, ZEROS[:1], SHUFFLED[:2]])
def test_a_first_batch_with_few_pairs_warns_once(labels):
    head, size, classes = APIHead(DIM, 40), len(labels), len(labels.unique())
    numbers = rf"{size if size > 1 else 2} of the {2 * size} pairs.*{size} images, of {classes} different classes"
    with pytest.warns(UserWarning, match=rf"{numbers}.*batch_sampler=BalancedBatchSampler") as caught:
        head(torch.randn(size, DIM), labels)
    ours = [one.filename for one in caught if one.category is UserWarning]
    assert ours == [__file__], "it points at whoever called the head"
    with no_warnings():
        head(torch.randn(size, DIM), labels)
        copy.deepcopy(head)(torch.randn(size, DIM), labels)


@pytest.mark.parametrize(
    "call",
    [
        lambda head, x: head(x, BALANCED),
        lambda head, x: head(x, BALANCED * (SHUFFLED >= 4)),  # 8 images of one class
        lambda head, x: head(x, torch.where(SHUFFLED % 2 == 0, BALANCED, -1)),  # half of them without a class
        lambda head, x: head(x),
        lambda head, x: head(x * torch.nan, BALANCED),  # no lack of images: the loss shows it
        lambda head, x: head.eval()(x, SHUFFLED),
        lambda head, x: head(x, SHUFFLED, pairs=random_pairs(SHUFFLED, 5)),
        lambda head, x: head(x, SHUFFLED, keys=x, key_labels=SHUFFLED, key_offset=0),
        lambda head, x: head(x[:0], BALANCED[:0]),
        lambda head, x: torch.no_grad()(head)(x, SHUFFLED),
        lambda head, x: APIHead(DIM, 40, memory=64)(x, SHUFFLED),
        lambda head, x: (head(x, BALANCED), head(x, SHUFFLED)),  # a good first batch ends the looking
    ],
)
def test_nothing_is_said_where_nothing_is_amiss(call):
    with no_warnings():
        call(APIHead(DIM, 40), torch.randn(32, DIM))


def test_nothing_is_looked_at_while_tracing():
    x, head = torch.randn(32, DIM), APIHead(DIM, 40)
    with no_warnings(UserWarning):
        torch.compile(head, fullgraph=True, backend="eager")(x, SHUFFLED)
        torch.export.export(head, (x, SHUFFLED))
        with FakeTensorMode():
            APIHead(DIM, 40)(torch.randn(32, DIM), torch.zeros(32, dtype=torch.long))
        APIHead(DIM, 40, device="meta")(x.to("meta"), SHUFFLED.to("meta"))
    with pytest.warns(UserWarning, match="32 of the 64 pairs"):  # and afterwards it is the first batch still
        head(x, SHUFFLED)


# With a memory. That it is the head with the batch and the past as keys, is in test_fuzz.py.


def with_memory():
    """A head with a memory and one without, of the same weights, and batches for them."""
    return make_case(memory=10)[0], make_case()[0], [make_case(size=6, seed=seed)[1:] for seed in range(4)]


def test_only_training_searches_and_fills_a_memory():
    head, plain, [batch, (x, y), *_] = with_memory()
    head(*batch)
    before = [buffer.clone() for buffer in head.memory.buffers()]

    def found(net):
        outputs = [torch.no_grad()(net)(x, y), net(x, y, pairs=mine_pairs(x, y)), net.eval()(x, y)]
        return [net.train()(x), *(output.logits_self for output in outputs)]

    torch.testing.assert_close(found(head), found(plain))
    torch.testing.assert_close([*head.memory.buffers()], before, rtol=0, atol=0, equal_nan=True)


def test_a_memory_set_later_goes_on_where_the_state_dict_ended():
    head, resumed, [*batches, last] = with_memory()
    for batch in batches:
        head(*batch)
    names = {"memory.features", "memory.labels", "memory.num_pushed"}
    assert head.state_dict().keys() - resumed.state_dict().keys() == names
    resumed.memory = FeatureMemory(10, DIM, dtype=torch.float64)
    resumed.load_state_dict(head.state_dict())
    found, expected = resumed(*last), head(*last)
    assert (found.pairs.partner >= 6).any()
    torch.testing.assert_close([*found[:4], *found.pairs], [*expected[:4], *expected.pairs])
    torch.testing.assert_close([*resumed.memory.buffers()], [*head.memory.buffers()], rtol=0, atol=0)


@pytest.mark.parametrize("mutual", MUTUALS)
@pytest.mark.parametrize("own", [False, True])
def test_grad_of_torch_func_is_that_of_autograd(mutual, own):
    head, features, labels = make_case(mutual=mutual)
    head.classifier = nn.Sequential(head.classifier, nn.Tanh()) if own else head.classifier

    def loss(parameters, features):
        call = partial(torch.func.functional_call, head, parameters, (features, labels))
        return api_loss(call()) + call({"criterion": APILoss(rows=4)}).total

    expected = gradients(2 * api_loss(head(features, labels)), head, features)
    parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
    found, of_features = torch.func.grad(loss, argnums=(0, 1))(parameters, features.detach())
    torch.testing.assert_close([*(found[name] for name in parameters), of_features], [*expected])


@pytest.mark.parametrize("mutual", MUTUALS)
@pytest.mark.parametrize("memory", [0, 8])
def test_the_default_device_may_be_another(mutual, memory):
    head, features, labels = make_case(mutual=mutual, memory=memory, dropout=0.5)
    with torch.device("meta"):
        there = APIHead(DIM, CLASSES, mutual=mutual, memory=memory)
        assert api_loss(there(torch.randn(12, DIM), torch.zeros(12, dtype=torch.long))).device.type == "meta"
        api_loss(head(features, labels)).backward()
        assert head(features).device.type == "cpu"
        gates = head.gates(features, random_pairs(labels, 5))
    assert features.grad.isfinite().all()
    assert gates[0].isfinite().all()


def test_numpy_numbers_become_plain_ones():
    head = APIHead(np.int64(9), np.int32(5), hidden_dim=np.int16(6), dropout=np.float32(0.25), memory=np.int64(8))
    numbers = [head.dim, head.num_classes, head.mutual.drop.p, head.drop.p, head.memory.size, head.memory.dim]
    assert [repr(number) for number in numbers] == ["9", "5", "0.25", "0.25", "8", "9"]
    assert "memory=8" in repr(head)
    assert "memory=0" in repr(HEAD)


@pytest.mark.parametrize(("memory", "more"), [(0, 1), (5000, 7)])
def test_the_head_keeps_five_numbers_a_channel_of_each_pair(memory, more):
    # The mutual vector, and the four gated features as the classifier takes them; nn.Dropout adds its masks. What the
    # published head keeps is fifteen: benchmarks/head.py compares. The features are kept once, in place of those given;
    # with a memory also the partners from there, and the pairs as the MLP takes them.
    head, features, labels = make_case(size=40, dim=1024, classes=8, memory=memory)
    found, loss = saved_bytes(lambda: api_loss(head(features, labels)), [features, *head.parameters()])
    assert found <= 1.05 * (5 * 2 + more) * features.nbytes
    loss.backward()


X, Y = torch.zeros(4, DIM), torch.zeros(4, dtype=torch.long)
HEAD, PAST, BARE = APIHead(DIM, 3), APIHead(DIM, memory=4), APIHead(DIM)
ELSEWHERE = mine_pairs(X.to("meta"), Y.to("meta"))
NO_LOGITS = r"no classifier.*float32 \[16, 9\].*num_classes=.*classifier="


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: HEAD(torch.zeros(4, 10)), ValueError, r"\[B, 9\].*float32 \[4, 10\].*dim=10"),
        (lambda: HEAD(X, keys=X), ValueError, r"need labels"),
        (lambda: HEAD(X, criterion=APILoss()), ValueError, "need labels, got labels=None"),
        (
            lambda: HEAD(X, Y, key_offset=0, pairs=mine_pairs(X, Y)),
            ValueError,
            r"key_offset needs both, got only key_offset",
        ),
        (lambda: PAST(X, Y, keys=X, key_labels=Y), ValueError, r"partners there, got keys.*\[4, 9\].*memory=0"),
        (lambda: HEAD(X, Y, pairs=ELSEWHERE), ValueError, r"pairs.anchor.*one device"),
        (lambda: HEAD(X, Y, criterion=nn.CrossEntropyLoss()), TypeError, "an APILoss, got CrossEntropyLoss"),
        (lambda: BARE(X, Y, criterion=APILoss()), ValueError, r"no classifier.*num_classes=.*classifier="),
        (lambda: api_loss(BARE(X, Y)), ValueError, NO_LOGITS),
        (lambda: APILoss()(BARE(X, Y)), ValueError, NO_LOGITS),
        (lambda: APIHead(DIM, mutual="individual", gate="single"), ValueError, r"'individual' has none"),
        (lambda: HEAD(X, Y, classifier=lambda x: x.view(2, 16, 9)), ValueError, r"\[N, C\], got .*\[2, 16, 9\].*N=32"),
        (lambda: HEAD(X, Y, classifier=lambda x: x.view(16, 18)), ValueError, r"\[N, D\] to .*\[16, 18\].*N=32"),
    ],
)
def test_errors_show_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("memory", [0, 30])
@pytest.mark.parametrize(("dtype", "autocast"), [*((dtype, False) for dtype in DTYPES[:3]), (torch.float32, True)])
def test_lower_precision_stays_near_float64(dtype, autocast, memory):
    (head, *_), (exact, *_) = (make_case(dim=32, classes=6, memory=memory) for _ in range(2))
    head.to(dtype)
    for seed in range(3):
        _, features, labels = make_case(24, 32, 6, seed)
        features = features.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = api_loss(head(features if autocast else features.to(dtype), labels))
        expected = api_loss(exact(features.double(), labels))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
        found.backward()
    assert memory == 0 or head.memory.features.dtype == dtype
