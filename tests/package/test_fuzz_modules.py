"""Anything at all into the modules, the sampler and `explain_pair`, as in test_fuzz.py."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from fuzzing import (
    LAYOUTS,
    MODES,
    NO_CLASSES,
    NO_COUNT,
    NO_FEATURES,
    NO_LABELS,
    NO_NUMBER,
    be,
    check_refused,
    draw_batch,
    fuzzed,
    one_of,
    spoil,
)
from hypothesis import strategies as st
from strategies import DTYPES
from torch import nn

from apinet_head import (
    APIHead,
    APINet,
    BalancedBatchSampler,
    ChunkedBackbone,
    FeatureMemory,
    PairExplanation,
    api_loss,
    explain_pair,
)

NO_MODULE = (be(None), be(3), lambda net: [net], lambda net: (net, net), be(nn.Linear))


@fuzzed
def test_feature_memory(data):
    sizes = {"size": data.draw(st.integers(1, 9)), "dim": data.draw(st.integers(1, 4)), "dtype": one_of(data, DTYPES)}
    ways = {
        "size": NO_COUNT,
        "dim": NO_COUNT,
        "dtype": (be(torch.int64), be(torch.bool), be(torch.complex64), be("half")),
    }
    given, spoiled = spoil(data, sizes, ways)
    if spoiled:
        check_refused(lambda: FeatureMemory(**given), *spoiled)
        return
    memory, pushed = FeatureMemory(**sizes), []
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data)
        batch = {"features": features.detach()[:, [0] * memory.dim], "labels": labels}
        ways = {"features": (*NO_FEATURES, lambda x: torch.cat([x, x], 1)), "labels": (*NO_LABELS, be(None))}
        batch, spoiled = spoil(data, batch, ways)
        with one_of(data, MODES)():
            if spoiled:
                check_refused(lambda batch=batch: memory.push(**batch), *spoiled)
            else:
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
def test_head_with_a_memory(data):
    size, dim = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    head, plain = (APIHead(dim, 50, hidden_dim=3, dropout=0.0, memory=memory) for memory in (size, 0))
    plain.load_state_dict({name: value for name, value in head.state_dict().items() if "memory" not in name})
    past = FeatureMemory(size, dim)
    for _ in range(data.draw(st.integers(1, 4))):
        features, labels, _ = draw_batch(data, dtypes=[torch.float32], kinds=("normal", "ties", "non-finite"))
        features, labels = features[:, [0] * dim], labels.long() - data.draw(st.sampled_from([0, 6]))  # or no class
        keys, key_labels = torch.cat([features.detach(), past.features]), torch.cat([labels, past.labels])
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
def test_sampler(data):
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
    given, spoiled = spoil(data, arguments, ways)
    if spoiled:
        check_refused(lambda: BalancedBatchSampler(**given), *spoiled)
        return
    sampler, labels = BalancedBatchSampler(**given), [int(label) for label in given["labels"]]
    batches, size = list(sampler), given["n_classes"] * given["n_samples"]
    assert len(batches) == len(sampler) == (given["n_batches"] or max(1, len(labels) // size))
    for batch in batches:
        shares = Counter(labels[index] for index in batch)
        assert len(shares) == given["n_classes"] // given["world_size"]
        assert set(shares.values()) == {given["n_samples"]}


@pytest.mark.filterwarnings("ignore:no image will have another of the same class")
@fuzzed
def test_state_of_a_sampler(data):
    arguments = {**draw_sampler(data), "n_batches": 4}
    sampler, other = BalancedBatchSampler(**arguments), BalancedBatchSampler(**arguments)
    epoch, done = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 4))
    sampler.set_epoch(epoch)
    state = sampler.state_dict(done)
    rubbish = (be(math.nan), be(-77), be(0.5), be(None), be("1"), be(True), be([1]), be(torch.ones(2)), be(10**9))
    given, spoiled = spoil(data, state, {name: rubbish[:-1] if name == "epoch" else rubbish for name in state})
    if data.draw(st.booleans()):
        given, spoiled = one_of(data, [[], None, 3, "state", {}, {"epoch": 1}, sampler]), [type]
        with pytest.raises((ValueError, TypeError), match="state"):
            other.load_state_dict(given)
    elif spoiled:
        check_refused(lambda: other.load_state_dict(given), *spoiled)
    else:
        other.load_state_dict(given)
    batches = list(sampler)
    if spoiled:
        sampler.set_epoch(0)
        assert list(other) == list(sampler), "a refused state is to change nothing"
    else:
        assert list(other) == batches[done:]
    check_refused(lambda: sampler.set_epoch(-1), -1)
    check_refused(lambda: sampler.state_dict(0.5), 0.5)


def flat_backbone(channels, dim, dtype=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels, dim, dtype=dtype))


@fuzzed
def test_chunked_backbone(data):
    size, dtype = data.draw(st.integers(0, 9)), one_of(data, DTYPES[2:])
    images = one_of(data, LAYOUTS)(torch.randn(size, 3, 2, 2, dtype=dtype)).requires_grad_(data.draw(st.booleans()))
    channels = images[0:1].numel() if size else images.new_zeros(1, *images.shape[1:]).numel()
    arguments = {"backbone": flat_backbone(channels, 4, dtype), "chunk_size": data.draw(st.integers(1, 10))}
    given, spoiled = spoil(
        data, arguments, {"backbone": (*NO_MODULE, be("resnet18")), "chunk_size": (*NO_COUNT, be(None))}
    )
    if spoiled:
        check_refused(lambda: ChunkedBackbone(**given), *spoiled)
        return
    net = ChunkedBackbone(**given)
    wrong = one_of(data, [None, [images], 3, torch.tensor(1.0), {"images": images}])
    check_refused(lambda: net(wrong), wrong)
    with one_of(data, MODES)():
        features = net(images)
        expected = torch.cat([net.backbone(chunk) for chunk in images.split(net.chunk_size)])
    assert torch.equal(features, expected)
    if features.requires_grad:
        features.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.filterwarnings("ignore:.* pairs of the first batch")
@fuzzed
def test_apinet(data):
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
    given, spoiled = spoil(data, arguments, ways)
    if spoiled:
        check_refused(lambda: APINet(**given), *spoiled)
        return
    net = APINet(**given)
    rates, spoiled = spoil(
        data, {"lr": 0.1, "backbone_lr": 0.0, "weight_decay": 0.0},
        {name: (*NO_NUMBER, be(-0.1)) for name in ("lr", "backbone_lr", "weight_decay")},
    )  # fmt: skip
    if spoiled:
        check_refused(lambda: net.parameter_groups(**rates), *spoiled)
    else:
        assert len(net.parameter_groups(**rates)) == 2
    spoiled_labels, spoiled = spoil(data, {"labels": labels}, {"labels": NO_LABELS})
    with one_of(data, MODES)():
        if spoiled:
            check_refused(lambda: net(features, **spoiled_labels), *spoiled)
            return
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
def test_explain_pair(data):
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
    given, spoiled = spoil(data, arguments, ways)
    with one_of(data, MODES)():
        if spoiled:
            check_refused(lambda: explain_pair(**given), *spoiled)
            return
        seen = explain_pair(**given)
    top_k = given["top_k"]
    assert isinstance(seen, PairExplanation)
    assert ((seen.gates > 0) & (seen.gates < 1)).all()
    for channels, maps in ((seen.channels, seen.heatmaps), (seen.plain_channels, seen.plain_heatmaps)):
        assert maps.shape == (2, top_k, *sides)
        assert ((maps >= 0) & (maps <= 1)).all()
        assert all(len({*row}) == top_k and {*row} <= {0, 1, 2, 3} for row in channels.tolist())
    assert seen.similarity.abs() <= 1 + 1e-5
