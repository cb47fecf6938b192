"""`ChunkedBackbone` against its chunks run one after the other, bit for bit, for backbones with all kinds of state."""

import random

import numpy as np
import pytest
import timm
import torch
from chunks import assert_same_gradients, assert_same_statistics, batch, chunked_and_plain, one_after_the_other, small
from stand_ins import Calling
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
from watching import Made

from apinet_head import ChunkedBackbone


class Tail(nn.Module):
    """Convolution and `middle`, whose state matters for all that comes before it."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 6, 3), middle, nn.Conv2d(6, 4, 3)

    def forward(self, images):
        return self.last(self.middle(self.first(images)).relu()).square().mean((2, 3))


class Centred(nn.Module):
    """Subtracts a mean over all calls so far, which is kept in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("mean", None if way == "made in forward" else torch.zeros(6))
        if way == "tied":
            self.register_buffer("same", self.mean)
        if way == "resized":
            self.register_buffer("rows", torch.zeros(0, 6))

    def forward(self, maps):
        now = maps.detach().mean((0, 2, 3))
        if self.way == "in place":
            self.mean.mul_(0.9).add_(now)
        elif self.way == "tied":
            self.mean.mul_(0.5)
            self.same.add_(now)
        elif self.way == "resized":
            self.rows.resize_(len(self.rows) + 1, 6)[-1].copy_(now)
            self.mean = self.rows.mean(0)
        else:
            self.mean = now if self.mean is None else 0.9 * self.mean + now
        return maps * (1 + self.mean.clone().tanh()[:, None, None])


def fake_quantize(observer, **arguments):
    return FakeQuantize(observer, quant_min=0, quant_max=255, **arguments)


def normed_twice(convolution):
    """One layer in two places, its weight recomputed by a parametrisation that keeps vectors as it goes."""
    layer = nn.utils.parametrizations.spectral_norm(convolution)
    return nn.Sequential(layer, nn.Tanh(), layer)


def padded():
    return nn.Conv2d(6, 6, 3, padding=1)


def with_own_generator():
    source = torch.Generator().manual_seed(3)
    return Calling(lambda maps: maps * (1 + torch.rand((), generator=source).item()), source=source)


MIDDLES = {
    "spectral_norm": lambda: nn.utils.spectral_norm(padded()),
    "parametrised spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(padded()),
    "weights tied and parametrised": lambda: normed_twice(padded()),
    **{f"buffer {way}": lambda way=way: Centred(way) for way in ("in place", "out of place", "tied", "resized")},
    "buffer made in forward": lambda: Centred("made in forward"),
    "FakeQuantize": lambda: fake_quantize(MovingAverageMinMaxObserver),
    "FakeQuantize by channels": lambda: fake_quantize(
        MovingAveragePerChannelMinMaxObserver, ch_axis=1, qscheme=torch.per_channel_affine
    ),
    "BatchNorm": lambda: nn.BatchNorm2d(6),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "own generator": with_own_generator,
    "Python's random": lambda: Calling(lambda maps: maps * (1 + random.random())),
    "numpy's random": lambda: Calling(lambda maps: maps * (1 + np.random.random())),
}


def small_with(norm, **settings):
    return lambda: small(lambda channels: norm(channels, **settings))


BACKBONES = {
    **{name: lambda make=make: Tail(make()) for name, make in MIDDLES.items()},
    "BatchNorm and dropout": small,
    "no momentum": small_with(nn.BatchNorm2d, momentum=None),
    "not affine": small_with(nn.BatchNorm2d, affine=False),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()),
    "timm BatchNormAct": lambda: timm.create_model("test_efficientnet", num_classes=0, drop_path_rate=0.3),
    "timm SyncBatchNormAct": lambda: timm.layers.convert_sync_batchnorm(BACKBONES["timm BatchNormAct"]()),
    "timm ResNet": lambda: timm.create_model("test_resnet", num_classes=0, drop_path_rate=0.3, drop_rate=0.2),
    "timm ViT": lambda: timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3, img_size=32),
}


def make(name):
    torch.manual_seed(0)
    module = BACKBONES[name]().train()
    return module if "FakeQuantize" in name else module.double()


def seeded():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@pytest.mark.parametrize(
    ("size", "chunk_size", "keep"),
    [(12, 4, 0), (12, 4, 2), (11, 4, 0), (11, 4, 1), (11, 4, 2), (11, 4, 3), (6, 6, 1), (5, 8, 1)],
)
@pytest.mark.parametrize("name", BACKBONES)
def test_features_gradients_and_state_are_those_of_the_chunks_run_plainly(name, size, chunk_size, keep):
    plain, chunked = make(name), ChunkedBackbone(make(name), chunk_size, keep=keep)
    images = [batch(size).to(next(plain.parameters()).dtype).requires_grad_() for _ in range(2)]
    found = []
    for run, own in zip((lambda x: one_after_the_other(plain, x, chunk_size), chunked), images, strict=True):
        seeded()
        # Two passes before the first backward pass: the second changes the state once more.
        found.append(([run(own), run(own)], random.getstate(), np.random.random()))
    (expected, *states), (features, *own_states) = found
    assert all(map(torch.equal, features, expected))
    assert own_states == states
    assert_same_statistics(chunked, plain)
    for first, second in (expected, features):
        first.sin().sum().backward(retain_graph=True)
        second.square().sum().backward()
        first.sin().sum().backward()
    assert torch.equal(images[1].grad, images[0].grad)
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


@pytest.mark.parametrize(("name", "draw"), [("Python's random", random.random), ("numpy's random", np.random.random)])
def test_the_backward_pass_leaves_the_random_states_that_it_finds(name, draw):
    seeded()
    expected = draw()
    loss = ChunkedBackbone(make(name), 4)(batch(15)).sum()
    seeded()
    loss.backward()
    assert draw() == expected


def test_buffers_are_the_same_tensors_after_the_backward_pass():
    chunked = ChunkedBackbone(make("BatchNorm"), 4)
    before = list(chunked.buffers())
    chunked(batch(15)).sum().backward()
    assert all(one is other for one, other in zip(chunked.buffers(), before, strict=True))


def test_a_large_buffer_that_does_not_change_is_copied_once():
    table = Calling(lambda maps: maps * table.weight[0, 0])
    table.register_buffer("weight", torch.ones(1000, 1000))
    backbone, copies = Tail(table), set()
    with Made(lambda tensor: copies.add(tensor.data_ptr()) if tensor.numel() == 10**6 else None):
        ChunkedBackbone(backbone, 2, keep=0)(batch(16).float())
    assert len(copies) == 1


WEIGHT = r"weight \[6, 3, 3, 3\] of the backbone's Conv2d was"
CHANGES = {
    "eval": (lambda net: net.eval(), r"was in train mode in the forward pass and is not in its backward pass"),
    "one module's eval": (lambda net: net[1].eval(), r"BatchNorm2d of the backbone was in train mode in the forward"),
    "step": (
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1).step(),
        f"{WEIGHT} changed between the forward pass and its backward",
    ),
    "weight": (lambda net: nn.init.zeros_(net[0].weight), f"{WEIGHT} changed"),
    "exchanged": (lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach())), f"{WEIGHT} exchanged"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_changes_before_the_backward_pass_is_named(change, message):
    net = ChunkedBackbone(small(), 4, keep=0)  # for kept chunks autograd itself refuses changed weights
    net(batch(10)).sum().backward()
    loss = net(batch(10)).sum()
    change(net.backbone)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    net.train()
    net(batch(10)).sum().backward()


def test_parameters_exchanged_by_functional_call_are_named():
    chunked = ChunkedBackbone(small(nn.Identity), 4)
    others = {name: nn.Parameter(2 * value.detach()) for name, value in chunked.named_parameters()}
    loss = torch.func.functional_call(chunked, others, (batch(10),)).sum()
    with pytest.raises(RuntimeError, match="was exchanged between the forward pass and its backward pass"):
        loss.backward()


def test_all_chunks_kept_take_any_change_that_autograd_takes():
    chunked, reference, plain = chunked_and_plain(small(nn.Identity), keep=3)
    for run, module in ((chunked, chunked), (reference, plain)):
        torch.manual_seed(1)
        loss = run(batch(10)).sum()
        module.eval()
        loss.backward()
    assert_same_gradients(chunked, plain)


def test_lazy_modules_learn_their_shapes_in_the_first_chunk():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).double()
    ChunkedBackbone(lazy, 4)(batch(10)).sum().backward()
    assert lazy[0].weight.grad.shape == (4, 3, 3, 3)
