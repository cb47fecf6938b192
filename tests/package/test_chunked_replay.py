"""Chunks that are recomputed from the state that they first saw: all kinds of it, against the chunks run plainly."""

import copy
import random

import numpy as np
import pytest
import torch
from chunks import batch, one_after_the_other, small
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

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


class BatchRenorm(nn.Module):
    """Ioffe 2017: normalises by the batch, and corrects towards the running statistics, which it then updates."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))

    def forward(self, maps):
        mean = maps.mean((0, 2, 3))
        std = maps.std((0, 2, 3))
        r = (std.detach() / self.running_std).clamp(1 / 3, 3)
        d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-5, 5)
        with torch.no_grad():
            self.running_mean += 0.3 * (mean - self.running_mean)
            self.running_std += 0.3 * (std - self.running_std)
        shape = (-1, 1, 1)
        return (maps - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)


class Noisy(nn.Module):
    """Scales its input by a random number, drawn from a source other than torch's own."""

    def __init__(self, draw, **attributes):
        super().__init__()
        self.draw = draw
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, maps):
        return maps * (1 + self.draw(self))


def fake_quantize(observer, **arguments):
    return FakeQuantize(observer, quant_min=0, quant_max=255, **arguments)


def normed_twice(convolution):
    """One layer in two places, its weight recomputed by a parametrisation that keeps vectors as it goes."""
    layer = nn.utils.parametrizations.spectral_norm(convolution)
    return nn.Sequential(layer, nn.Tanh(), layer)


def padded():
    return nn.Conv2d(6, 6, 3, padding=1)


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
    "BatchRenorm": lambda: BatchRenorm(6),
    "BatchNorm": lambda: nn.BatchNorm2d(6),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "own generator": lambda: Noisy(
        lambda self: torch.rand((), generator=self.source).item(), source=torch.Generator().manual_seed(3)
    ),
    "Python's random": lambda: Noisy(lambda self: random.random()),
    "numpy's random": lambda: Noisy(lambda self: np.random.random()),
}


def make(name):
    torch.manual_seed(0)
    module = Tail(MIDDLES[name]())
    return module if "FakeQuantize" in name else module.double()


def seeded():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def images_for(module, size):
    return batch(size).to(module.first.weight.dtype)


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("name", MIDDLES)
def test_gradients_and_state_are_those_of_the_chunks_run_plainly(name, keep):
    plain, chunked = make(name), ChunkedBackbone(make(name), 4, keep=keep)
    images = images_for(plain, 15)
    losses = []
    for run in (lambda: one_after_the_other(plain, images, 4), lambda: chunked(images)):
        seeded()
        # Two passes before the first backward pass: the second changes the state once more.
        losses.append((run().square().sum(), run().square().sum(), random.getstate(), np.random.random()))
    (*expected, python, numpys), (*found, own_python, own_numpys) = losses
    assert found == expected
    assert (own_python, own_numpys) == (python, numpys)
    state = buffers(plain)
    assert_equal(buffers(chunked.backbone), state)
    for pair in (expected, found):
        for loss in pair:
            loss.backward(retain_graph=True)
        pair[0].backward()
    for (weight, right), value in zip(plain.named_parameters(), chunked.backbone.parameters(), strict=True):
        assert torch.equal(value.grad, right.grad), weight
    assert_equal(buffers(chunked.backbone), state)


def test_the_backward_pass_leaves_the_random_states_that_it_finds():
    for name, draw in (("Python's random", random.random), ("numpy's random", np.random.random)):
        chunked = ChunkedBackbone(make(name), 4)
        seeded()
        loss = chunked(batch(15)).sum()
        seeded()
        expected = draw()
        seeded()
        loss.backward()
        assert draw() == expected


def test_buffers_are_the_same_tensors_after_the_backward_pass():
    chunked = ChunkedBackbone(make("BatchNorm"), 4)
    before = list(chunked.buffers())
    chunked(batch(15)).sum().backward()
    assert all(one is other for one, other in zip(chunked.buffers(), before, strict=True))


def test_a_large_buffer_that_does_not_change_is_copied_once():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.ones(1000, 1000))

        def forward(self, maps):
            return maps * self.table[0, 0]

    backbone = Tail(Table())
    copied = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.numel() == 10**6:
                copied.append(out)
            return out

    with Counting():
        ChunkedBackbone(backbone, 2, keep=0)(batch(16).float())
    assert len({one.data_ptr() for one in copied}) == 1


def changes(net, optimizer):
    return {
        "eval": lambda: net.eval(),
        "one module's eval": lambda: net.backbone[1].eval(),
        "step": optimizer.step,
        "weight": lambda: nn.init.zeros_(net.backbone[0].weight),
        "exchanged": lambda: setattr(net.backbone[0], "weight", nn.Parameter(net.backbone[0].weight.detach().clone())),
    }


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("eval", r"was in train mode in the forward pass and is not in its backward pass"),
        ("one module's eval", r"BatchNorm2d of the backbone was in train mode in the forward pass"),
        (
            "step",
            r"weight \[6, 3, 3, 3\] of the backbone's Conv2d was changed between the forward pass and its backward",
        ),
        ("weight", r"weight \[6, 3, 3, 3\] of the backbone's Conv2d was changed"),
        ("exchanged", r"weight \[6, 3, 3, 3\] of the backbone's Conv2d was exchanged"),
    ],
)
def test_what_changes_before_the_backward_pass_is_named(what, message):
    net = ChunkedBackbone(small(), 4, keep=0)  # for kept chunks autograd itself refuses changed weights
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(batch(10)).sum().backward()
    loss = net(batch(10)).sum()
    changes(net, optimizer)[what]()
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
    plain = small(nn.Identity)
    chunked = ChunkedBackbone(copy.deepcopy(plain), 4, keep=3)
    losses = [run(batch(10)).sum() for run in (chunked, lambda images: one_after_the_other(plain, images, 4))]
    for loss, module in zip(losses, (chunked, plain), strict=True):
        module.eval()
        loss.backward()
    assert_equal(dict(chunked.backbone.named_parameters()), dict(plain.named_parameters()))


def test_lazy_modules_learn_their_shapes_in_the_first_chunk():
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)).double()
    ChunkedBackbone(lazy, 4)(batch(10)).sum().backward()
    assert lazy[0].weight.grad.shape == (4, 3, 3, 3)
