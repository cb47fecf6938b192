"""Anything at all into all that is public: the documented result, or an error that shows what came."""

import math
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from fuzzing import (
    INTEGERS,
    LAYOUTS,
    MODES,
    NO_CLASSES,
    NO_COUNT,
    NO_FEATURES,
    NO_LABELS,
    NO_NUMBER,
    NO_SHARE,
    be,
    check_all_refused,
    check_refused,
    draw_batch,
    fuzzed,
    more,
    one_of,
)
from hypothesis import strategies as st
from mined import HOWS, check_pairs
from strategies import DTYPES
from torch import nn

from apinet_head import (
    APIHead,
    APILoss,
    APINet,
    APIOutput,
    BalancedBatchSampler,
    ChunkedBackbone,
    FeatureMemory,
    LossTerms,
    PairExplanation,
    Pairs,
    api_loss,
    api_loss_terms,
    explain_pair,
    gather_features,
    mine_pairs,
    random_pairs,
)
from apinet_head.mutual import MUTUALS

NO_DTYPE = (be(torch.int64), be(torch.bool), be(torch.complex64), be("float32"))
NO_MODULE = (be(None), be(3), lambda net: [net], lambda net: (net, net), be(nn.Linear))
NO_HOW = (be("nearest"), be(1), be(["similar"]))


def draw_hows(data):
    intra = one_of(data, [*HOWS, None])
    return {"intra": intra, "inter": one_of(data, HOWS if intra is None else [*HOWS, None])}


def draw_keys(data, features, labels):
    """Keys that hold the batch among others, all in any dtype that holds the numbers; or nothing."""
    if len(features) == 0 or data.draw(st.booleans()):
        return {}
    before = data.draw(st.integers(0, min(3, len(features))))
    rows = torch.tensor([*range(before), *range(len(features)), 0])
    keys, key_labels = features.detach()[rows], labels.long()[rows]
    wider = torch.promote_types(keys.dtype, torch.float32)
    dtype = one_of(data, [dtype for dtype in INTEGERS if torch.equal(key_labels.to(dtype).long(), key_labels)])
    return {
        "keys": keys.to(one_of(data, [keys.dtype, wider])),
        "key_labels": key_labels.to(dtype),
        "key_offset": one_of(data, [before, None]),
    }


def check_candidates(pairs, features, labels, intra, inter, **keys):
    """Assert that partners are candidates where there are any; which of them is in mining/test_mining.py."""
    any_of_them = {"intra": intra and "random", "inter": inter and "random"}
    check_pairs(pairs, features, labels, **any_of_them, **keys)


KEYS = {
    "keys": (*NO_FEATURES[1:], lambda x: torch.cat([x, x[:, :1]], 1)),
    "key_labels": NO_LABELS,
    "key_offset": (be(-1), be(100), be(0.5), be(True), be("0")),
}


@fuzzed
def test_mine_pairs_takes_or_refuses_anything(data):
    features, labels, _ = draw_batch(data)
    if labels.dtype.is_signed:
        labels = labels - data.draw(st.integers(0, 20))
    arguments = {"features": features, "labels": labels, **draw_hows(data), **draw_keys(data, features, labels)}
    backend = one_of(data, ["auto", "dense", "tiled"])
    ways = {"features": NO_FEATURES, "labels": (*NO_LABELS, be(None)), "intra": NO_HOW, "inter": NO_HOW, **KEYS}
    with one_of(data, MODES)():
        check_all_refused(partial(mine_pairs, backend=backend), arguments, ways)
        check_candidates(mine_pairs(**arguments, backend=backend), **arguments)


@fuzzed
def test_random_pairs_takes_or_refuses_anything(data):
    _, labels, _ = draw_batch(data)
    count = data.draw(st.integers(0, 20))
    if len(labels) == 0:
        check_refused(lambda: random_pairs(labels, count), 0)
        return
    arguments = {"labels": labels, "num_pairs": count, "generator": torch.Generator()}
    ways = {"labels": NO_CLASSES, "num_pairs": NO_COUNT[1:], "generator": (be(0), be("cpu"))}
    check_all_refused(random_pairs, arguments, ways)
    pairs = random_pairs(**arguments)
    assert {field.shape for field in pairs} == {(count,)}
    assert ((pairs.anchor >= 0) & (pairs.anchor < len(labels))).all()
    assert ((pairs.partner >= 0) & (pairs.partner < len(labels))).all()
    of_anchor, of_partner = labels.long()[pairs.anchor], labels.long()[pairs.partner]
    assert torch.equal(pairs.same_class, (of_anchor == of_partner) & (of_anchor >= 0))
    assert (pairs.anchor != pairs.partner).all() or len(labels) == 1
    assert torch.equal(pairs.valid, (pairs.anchor != pairs.partner) & (of_anchor >= 0) & (of_partner >= 0))


def draw_head(data, **fixed):
    gate = one_of(data, ["pair", "single"])
    return {
        "hidden_dim": data.draw(st.integers(1, 5)),
        "dropout": one_of(data, [0.0, 0.5, 1.0]),
        "mutual": one_of(data, [name for name in MUTUALS if (gate, name) != ("single", "individual")]),
        "gate": gate,
        **draw_hows(data),
        **fixed,
    }


@fuzzed
def test_the_making_of_a_head_takes_or_refuses_anything(data):
    arguments = draw_head(
        data, dim=data.draw(st.integers(1, 9)), num_classes=data.draw(st.integers(0, 4)), dtype=one_of(data, DTYPES)
    )
    ways = {
        "dim": NO_COUNT,
        "num_classes": NO_COUNT[1:],
        "hidden_dim": NO_COUNT,
        "dropout": NO_SHARE,
        "mutual": (be("attention"), be(None), be(["mlp"]), be(torch.nn.Linear)),
        "gate": (be("triple"), be(None), be(["pair"])),
        "intra": NO_HOW,
        "inter": NO_HOW,
        "memory": NO_COUNT[1:],
        "dtype": NO_DTYPE,
    }
    check_all_refused(APIHead, {**arguments, "memory": 0}, ways)
    assert {parameter.dtype for parameter in APIHead(**arguments).parameters()} <= {arguments["dtype"]}


def is_ordinary(features):
    """Whether products of two features, the most that a mutual vector holds, are far from infinite in their dtype."""
    peak = features.detach().double().abs().amax() if len(features) else torch.tensor(0.0)
    return bool(100 * peak**2 < torch.finfo(features.dtype).max)  # not for NaN either


def check_loss(output, kind, ordinary, learning):
    """Assert that a loss is finite with its gradients where it should be, and that it isn't where it should not."""
    terms = api_loss_terms(output)
    assert isinstance(terms, LossTerms)
    if ordinary:
        assert torch.equal(output.valid, output.pairs.valid.repeat(2))
        assert all(term.isfinite() for term in terms)
    if kind == "non-finite":
        assert not terms.total.isfinite()
    if terms.total.requires_grad:
        gradients = torch.autograd.grad(terms.total, learning, allow_unused=True)
        assert not ordinary or all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
@fuzzed
def test_head_and_loss_takes_or_refuses_anything(data):
    features, labels, kind = draw_batch(data)
    classes, dtype = max(0, *labels.tolist()) + 1 if len(labels) else 3, features.dtype
    autocast = dtype in (torch.bfloat16, torch.float32) and data.draw(st.booleans())
    head = APIHead(features.shape[1], classes, **draw_head(data, dtype=torch.float32 if autocast else dtype))
    arguments = {"features": features, "labels": labels, **draw_keys(data, features, labels)}
    if "keys" in arguments:
        arguments["keys"] = arguments["keys"].to(dtype)
    wrong = (
        lambda x: torch.cat([x, x[:, :1]], 1),
        lambda x: x.to(torch.float32 if x.dtype == torch.float64 else torch.float64),
        lambda x: x.to(torch.bfloat16 if x.dtype == torch.float16 else torch.float16),
    )
    ways = {"features": (*NO_FEATURES, *wrong), "labels": NO_LABELS, **KEYS}
    with one_of(data, MODES)(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        check_all_refused(head, arguments, ways)
        assert head(features).shape == (len(features), classes)
        output = head(**arguments)
        pairs, rows = output.pairs, 2 * len(output.pairs.anchor)
        assert output.logits_self.shape == output.logits_other.shape == (rows, classes)
        assert output.labels.shape == output.valid.shape == (rows,)
        partner_labels = arguments.get("key_labels", labels).long()
        assert torch.equal(output.labels, torch.cat([labels.long()[pairs.anchor], partner_labels[pairs.partner]]))
        check_candidates(pairs, intra=head.intra, inter=head.inter, **arguments)
        learning = [value for value in (features, *head.parameters()) if value.requires_grad]
        check_loss(output, kind, is_ordinary(features), learning)
        if is_ordinary(features) and dtype in DTYPES[2:] and not (autocast or head.drop.p):
            criterion = APILoss(rows=data.draw(st.none() | st.integers(1, 9)))
            terms = head(**arguments, pairs=pairs, criterion=criterion)
            torch.testing.assert_close([*terms], [*api_loss_terms(output)])


@fuzzed
def test_pairs_of_ones_own_takes_or_refuses_anything(data):
    features, labels, _ = draw_batch(data, dtypes=DTYPES[2:], least=1)
    head = APIHead(features.shape[1], 50, **draw_head(data, dtype=features.dtype))
    keys = draw_keys(data, features, labels)
    count, rows = data.draw(st.integers(0, 9)), len(keys.get("keys", features))
    fields = {
        "anchor": torch.randint(len(features), (count,)),
        "partner": torch.randint(rows, (count,)),
        "same_class": torch.zeros(count, dtype=torch.bool),
        "valid": torch.rand(count) < 0.8,
    }
    ways = {
        "anchor": (be(None), more, lambda y: y.tolist(), lambda y: y.double(), lambda y: torch.full_like(y, -1)),
        "partner": (be(3), more, lambda y: y[:, None], lambda y: y.to("meta"), lambda y: torch.full_like(y, rows)),
        "valid": (be(None), more, lambda y: y.long(), lambda y: y.to("meta"), lambda y: y.tolist()),
    }
    if count:
        check_all_refused(lambda **f: head.gates(features, Pairs(**f), keys=keys.get("keys")), fields, ways)
        check_all_refused(lambda **f: head(features, labels, pairs=Pairs(**f), **keys), fields, ways)
    pairs = Pairs(**fields)
    gates = head.gates(features, pairs, keys=keys.get("keys"))
    assert {gate.shape for gate in gates} == {(count, features.shape[1])}
    output = head(features, labels, pairs=pairs, **keys)
    assert output.pairs is pairs
    assert len(output.valid) == 2 * count
    if is_ordinary(features):
        assert all(((gate >= 0) & (gate <= 1)).all() for gate in gates)
        of_both = labels.long()[pairs.anchor], keys.get("key_labels", labels).long()[pairs.partner]
        assert torch.equal(output.valid, (pairs.valid & (torch.stack(of_both) >= 0).all(0)).repeat(2))


@fuzzed
def test_loss_of_any_logits_takes_or_refuses_anything(data):
    rows, classes, dtype = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 6)), one_of(data, DTYPES)
    fields = {
        "logits_self": torch.randn(rows, classes).to(dtype).requires_grad_(data.draw(st.booleans())),
        "logits_other": torch.randn(rows, classes).to(one_of(data, DTYPES)),
        "labels": torch.randint(classes, (rows,)).to(one_of(data, INTEGERS)),
        "valid": torch.rand(rows) < 0.7,
        "num_rows": one_of(data, [None, torch.tensor(2.5)]),
    }
    weights = {
        "margin": data.draw(st.floats(-2, 2)),
        "rank_weight": data.draw(st.floats(-2, 2)),
        "label_smoothing": data.draw(st.floats(0, 1)),
        "class_weight": one_of(data, [None, (torch.rand(classes) + 0.1).to(dtype)]),
    }
    bad_weights = torch.ones(classes + 1), torch.ones(classes).long(), torch.ones(classes, device="meta")
    ways = {
        "logits_self": NO_FEATURES,
        "logits_other": (*NO_FEATURES, lambda x: torch.cat([x, x[:, :1]], 1)),
        "labels": (*NO_LABELS, be(None)),
        "valid": (be(None), more, lambda y: y.long(), lambda y: y.to("meta"), lambda y: y.tolist()),
        "num_rows": (be(3), be(torch.ones(2))),
        "margin": NO_NUMBER,
        "rank_weight": NO_NUMBER,
        "label_smoothing": NO_SHARE,
        "class_weight": (be(3), be([1.0]), *map(be, bad_weights)),
    }

    def loss_of(**given):
        return api_loss(APIOutput(pairs=None, **{name: given.pop(name) for name in fields}), **given)

    check_all_refused(loss_of, fields | weights, ways)
    row = data.draw(st.integers(0, rows - 1)) if rows else None
    number, label = (one_of(data, choices) for choices in ([0.0, torch.nan, torch.inf], [0, -1, classes, 10**9]))
    counts = row is not None and bool(fields["valid"][row]) and label >= 0
    if row is not None:  # a row with a bad number, a bad label or both: nothing to the loss, unless the row counts
        logits = fields["logits_self"]
        bad_row = torch.full((1, classes), number, dtype=dtype)
        fields["logits_self"] = torch.cat([logits[:row], bad_row, logits[row + 1 :]])
        fields["labels"] = fields["labels"].long().index_fill(0, torch.tensor(row), label)
    output = APIOutput(pairs=None, **fields)
    if counts and label:
        check_refused(lambda: api_loss(output, **weights), label)
        return
    loss = api_loss(output, **weights)
    assert loss.isfinite() == (number == 0 or not counts)
    if row is not None and not counts:  # whatever it holds, and why ever it is left out
        others = torch.arange(rows) != row
        without = output._replace(**{name: getattr(output, name)[others] for name in list(fields)[:4]})
        torch.testing.assert_close(loss, api_loss(without, **weights))


@fuzzed
def test_gather_features_of_one_process_takes_or_refuses_anything(data):
    features, labels, _ = draw_batch(data)
    ways = {"features": NO_FEATURES, "labels": (*NO_LABELS, be(None))}
    check_all_refused(gather_features, {"features": features, "labels": labels}, ways)
    all_features, all_labels, offset = gather_features(features, labels)
    assert all_features is features
    assert all_labels is labels
    assert offset == 0


@fuzzed
def test_feature_memory_takes_or_refuses_anything(data):
    sizes = {"size": data.draw(st.integers(1, 9)), "dim": data.draw(st.integers(1, 4)), "dtype": one_of(data, DTYPES)}
    check_all_refused(FeatureMemory, sizes, {"size": NO_COUNT, "dim": NO_COUNT, "dtype": NO_DTYPE})
    memory, pushed = FeatureMemory(**sizes), []
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data)
        batch = {"features": features.detach()[:, [0] * memory.dim], "labels": labels}
        ways = {"features": (*NO_FEATURES, lambda x: torch.cat([x, x], 1)), "labels": (*NO_LABELS, be(None))}
        with one_of(data, MODES)():
            check_all_refused(memory.push, batch, ways)
            memory.push(**batch)
        pushed += zip(batch["features"].to(memory.features.dtype), labels.tolist(), strict=True)
    # What was refused has left no trace.
    expected = [(torch.full((memory.dim,), math.nan, dtype=memory.features.dtype), -1)] * memory.size
    for place, row in enumerate(pushed):
        expected[place % memory.size] = row
    assert memory.labels.tolist() == [label for _, label in expected]
    rows = torch.stack([row for row, _ in expected])
    torch.testing.assert_close(memory.features, rows, rtol=0, atol=0, equal_nan=True)
    assert int(memory.filled) == min(len(pushed), memory.size)


@fuzzed
def test_head_with_a_memory_takes_or_refuses_anything(data):
    size, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    head, plain = (APIHead(dim, 50, hidden_dim=3, dropout=0.0, memory=memory) for memory in (size, 0))
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if "memory" not in name})
    past = FeatureMemory(size, dim)
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data, dtypes=[torch.float32], kinds=("normal", "ties", "non-finite"))
        features, labels = features[:, [0] * dim], labels.long() - data.draw(st.sampled_from([0, 6]))  # or no class
        keys, key_labels = torch.cat([features.detach(), past.features]), torch.cat([labels, past.labels])
        check_refused(partial(head, features, labels[:, None]), labels[:, None])
        output = head(features, labels)
        expected = plain(features, labels, keys=keys, key_labels=key_labels, key_offset=0)
        past.push(features, labels)
        torch.testing.assert_close([*output[:4], *output.pairs], [*expected[:4], *expected.pairs], equal_nan=True)
        assert api_loss(output).isfinite() == api_loss(expected).isfinite()
    torch.testing.assert_close([*head.memory.buffers()], [*past.buffers()], rtol=0, atol=0, equal_nan=True)


def draw_sampler(data):
    """Arguments of a sampler, whose labels are in any container; all of them fit."""
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    labels = [7 * label for label, count in enumerate(counts) for _ in range(count)]
    container = one_of(data, [list, tuple, np.array, torch.tensor, lambda rows: torch.tensor(rows, dtype=torch.int8)])
    world_size = one_of(data, [size for size in (1, 2, 3) if size <= len(counts)])
    return {
        "labels": container(labels),
        "n_classes": world_size * data.draw(st.integers(1, len(counts) // world_size)),
        "n_samples": data.draw(st.integers(1, 4)),
        "n_batches": data.draw(st.none() | st.integers(1, 4)),
        "seed": data.draw(st.integers(-5, 5)),
        "rank": data.draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
    }


@pytest.mark.filterwarnings("ignore:no image will have another of the same class")
@fuzzed
def test_sampler_takes_or_refuses_anything(data):
    arguments = draw_sampler(data)
    ways = {
        "labels": (
            *(lambda labels, way=way: way(torch.tensor([*labels])) for way in NO_CLASSES[1:]),
            lambda labels: [*labels[:-1], math.nan],
            lambda labels: [*labels[:-1], None],
            lambda labels: [*labels[:-1], [1]],
            lambda labels: np.array([*labels], dtype=float),
            lambda labels: [str(label) for label in labels],
            lambda labels: torch.tensor([*labels]).to("meta"),
            be(None),
            be(3),
        ),
        "n_classes": (*NO_COUNT, be(100)),
        "n_samples": NO_COUNT,
        "n_batches": NO_COUNT,
        "seed": (be(0.5), be(None), be(math.nan), be("0"), be(True)),
        "rank": (be(-1), be(3), be(0.0), be("0"), be(False)),
        "world_size": (*NO_COUNT, be(101)),
    }
    check_all_refused(BalancedBatchSampler, arguments, ways)
    sampler, labels = BalancedBatchSampler(**arguments), [int(label) for label in arguments["labels"]]
    batches, size = list(sampler), arguments["n_classes"] * arguments["n_samples"]
    assert len(batches) == len(sampler) == (arguments["n_batches"] or max(1, len(labels) // size))
    for batch in batches:
        shares = Counter(labels[index] for index in batch)
        assert len(shares) == arguments["n_classes"] // arguments["world_size"]
        assert set(shares.values()) == {arguments["n_samples"]}


@pytest.mark.filterwarnings("ignore:no image will have another of the same class")
@fuzzed
def test_state_of_a_sampler_takes_or_refuses_anything(data):
    arguments = {**draw_sampler(data), "n_batches": 4}
    sampler, other = BalancedBatchSampler(**arguments), BalancedBatchSampler(**arguments)
    first, done = list(sampler), data.draw(st.integers(0, 4))
    sampler.set_epoch(data.draw(st.integers(0, 9)))
    state = sampler.state_dict(done)
    rubbish = (be(math.nan), be(-77), be(0.5), be(None), be("1"), be(True), be([1]), be(torch.ones(2)), be(10**9))
    ways = {name: rubbish[:-1] if name == "epoch" else rubbish for name in state}
    check_all_refused(lambda **given: other.load_state_dict(given), state, ways)
    for wrong in ([], None, 3, "state", {}, {"epoch": 1}, sampler):
        with pytest.raises((ValueError, TypeError), match="state"):
            other.load_state_dict(wrong)
    assert list(other) == first, "a refused state is to change nothing"
    other.load_state_dict(state)
    assert list(other) == list(sampler)[done:]
    check_refused(lambda: sampler.set_epoch(-1), -1)
    check_refused(lambda: sampler.state_dict(0.5), 0.5)


def flat_backbone(channels, dim, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, dim, dtype=dtype))


@fuzzed
def test_chunked_backbone_takes_or_refuses_anything(data):
    size, dtype = data.draw(st.integers(0, 9)), one_of(data, DTYPES[2:])
    images = one_of(data, LAYOUTS)(torch.randn(size, 3, 2, 2, dtype=dtype)).requires_grad_(data.draw(st.booleans()))
    channels = images[0:1].numel() if size else images.new_zeros(1, *images.shape[1:]).numel()
    arguments = {"backbone": flat_backbone(channels, 4, dtype), "chunk_size": data.draw(st.integers(1, 10))}
    ways = {"backbone": (*NO_MODULE, be("resnet18")), "chunk_size": (*NO_COUNT, be(None))}
    check_all_refused(ChunkedBackbone, arguments, ways)
    net = ChunkedBackbone(**arguments)
    for wrong in (None, [images], 3, torch.tensor(1.0), {"images": images}):
        check_refused(lambda wrong=wrong: net(wrong), wrong)
    with one_of(data, MODES)():
        features = net(images)
        expected = torch.cat([net.backbone(chunk) for chunk in images.split(net.chunk_size)])
    assert torch.equal(features, expected)
    if features.requires_grad:
        features.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
@fuzzed
def test_apinet_takes_or_refuses_anything(data):
    features, labels, kind = draw_batch(data, dtypes=[torch.float32], kinds=("normal", "ties", "non-finite"))
    dim, classes = data.draw(st.integers(1, 5)), int(labels.long().max()) + 1 if len(labels) else 2
    arguments = {
        "backbone": flat_backbone(features.shape[1], dim),
        "num_classes": classes,
        "dim": dim,
        "chunk_size": data.draw(st.none() | st.integers(1, 5)),
        "hidden_dim": 3,
    }
    ways = {
        "backbone": NO_MODULE,
        "num_classes": (*NO_COUNT[1:], be(None)),
        "dim": NO_COUNT,
        "chunk_size": NO_COUNT,
        "hidden_dim": NO_COUNT,
    }
    check_all_refused(APINet, arguments, ways)
    net, rates = APINet(**arguments), {"lr": 0.1, "backbone_lr": 0.0, "weight_decay": 0.0}
    check_all_refused(net.parameter_groups, rates, dict.fromkeys(rates, (*NO_NUMBER, be(-0.1))))
    assert len(net.parameter_groups(**rates)) == 2
    with one_of(data, MODES)():
        check_all_refused(partial(net, features), {"labels": labels}, {"labels": NO_LABELS})
        loss = api_loss(net(features, labels))
        assert loss.isfinite() == (kind != "non-finite")
        assert net.eval()(features).shape == net.to_deploy()(features).shape == (len(features), classes)


class Pooled(nn.Module):
    """What `explain_pair` needs of a backbone: a map of 4 channels, and its mean."""

    def __init__(self, dtype):
        super().__init__()
        self.num_features = 4
        self.conv = nn.Conv2d(3, 4, 1, dtype=dtype)

    def forward_features(self, images):
        return self.conv(images)

    def forward(self, images):
        return self.forward_features(images).mean((2, 3))


@fuzzed
def test_explain_pair_takes_or_refuses_anything(data):
    dtype = one_of(data, DTYPES[2:])
    sides = [data.draw(st.integers(1, 7)) for _ in range(2)]
    images = one_of(data, [lambda x: x, lambda x: x.mT.contiguous().mT])(torch.randn(2, 3, *sides, dtype=dtype))
    arguments = {
        "net": APINet(Pooled(dtype), 3, hidden_dim=2, dtype=dtype),
        "images": images,
        "top_k": data.draw(st.integers(1, 4)),
    }
    ways = {
        "net": (*NO_MODULE, lambda net: net.backbone),
        "images": (
            be(None),
            lambda x: x.tolist(),
            more,
            lambda x: x[:1],
            lambda x: x[0],
            lambda x: x[..., :0],
            lambda x: x.long(),
            lambda x: x.half(),
            lambda x: x.to("meta"),
            lambda x: x.index_fill(2, torch.tensor(0), math.nan),
            lambda x: x.index_fill(1, torch.tensor(0), math.inf),
        ),
        "top_k": (*NO_COUNT, be(5)),
    }
    top_k = arguments["top_k"]
    with one_of(data, MODES)():
        check_all_refused(explain_pair, arguments, ways)
        seen = explain_pair(**arguments)
    assert isinstance(seen, PairExplanation)
    assert ((seen.gates > 0) & (seen.gates < 1)).all()
    for channels, maps in ((seen.channels, seen.heatmaps), (seen.plain_channels, seen.plain_heatmaps)):
        assert maps.shape == (2, top_k, *sides)
        assert ((maps >= 0) & (maps <= 1)).all()
        assert all(len({*row}) == top_k and {*row} <= {0, 1, 2, 3} for row in channels.tolist())
    assert seen.similarity.abs() <= 1 + 1e-5
