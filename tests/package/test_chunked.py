"""`ChunkedBackbone` against its chunks run one after the other, bit for bit, for backbones with all kinds of state."""

import copy
import random
import weakref
from functools import partial

import numpy as np
import pytest
import timm
import torch
from stand_ins import Calling
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.ao.quantization import FakeQuantize, MovingAveragePerChannelMinMaxObserver
from torch.testing import assert_close
from watching import Made

from apinet_head import APINet, ChunkedBackbone
from apinet_head.chunked import run_in_chunks


def small(norm=nn.BatchNorm2d, **settings):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6, **settings), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 8, 3), norm(8, **settings),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip


def batch(size):
    return torch.randn(size, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def one_after_the_other(backbone, images, chunk_size=4):
    return torch.cat([backbone(chunk) for chunk in images.split(chunk_size)])


def assert_same(found, expected, **tolerance):
    """Buffers, and the gradients that there are."""
    assert_close([*found.buffers()], [*expected.buffers()], **tolerance)
    assert_close(*([p.grad for p in net.parameters() if p.grad is not None] for net in (found, expected)), **tolerance)


def before_more(middle):
    """Convolution and `middle`, whose state matters for all that comes before it."""
    end = Calling(lambda maps: maps.square().mean((2, 3)))
    return nn.Sequential(nn.Conv2d(3, 6, 3), middle, nn.ReLU(), nn.Conv2d(6, 4, 3), end)


class Centred(nn.Module):
    """Subtracts a mean over all calls so far, which is kept in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.register_buffer("mean", None if way == "made in forward" else torch.zeros(6))
        self.register_buffer("same", self.mean if way == "tied" else None)
        self.register_buffer("rows", torch.zeros(0, 6) if way == "resized" else None)

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


padded = partial(nn.Conv2d, 6, 6, 3, padding=1)


def normed_twice():
    """One layer in two places, its weight recomputed by a parametrisation that keeps vectors as it goes."""
    layer = nn.utils.parametrizations.spectral_norm(padded())
    return nn.Sequential(layer, nn.Tanh(), layer)


def with_own_generator():
    source = torch.Generator().manual_seed(3)
    return Calling(lambda maps: maps * (1 + torch.rand((), generator=source).item()), source=source)


class ReadingTwice(torch.autograd.Function):
    """x², whose backward pass asks twice for what was saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] + ctx.saved_tensors[0])


MIDDLES = {
    "spectral_norm": lambda: nn.utils.spectral_norm(padded()),
    "parametrised spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(padded()),
    "weights tied and parametrised": normed_twice,
    **{way: partial(Centred, way) for way in ("in place", "out of place", "tied", "resized", "made in forward")},
    "FakeQuantize": FakeQuantize,
    "FakeQuantize by channels": lambda: FakeQuantize(
        MovingAveragePerChannelMinMaxObserver, ch_axis=1, qscheme=torch.per_channel_affine),
    "BatchNorm": lambda: nn.BatchNorm2d(6),
    "InstanceNorm": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
    "saved tensors read twice": lambda: Calling(ReadingTwice.apply),
    "own generator": with_own_generator,
    "Python's random": lambda: Calling(lambda maps: maps * (1 + random.random())),
    "numpy's random": lambda: Calling(lambda maps: maps * (1 + np.random.random())),
    "default device": lambda: Calling(lambda maps: maps * len(torch.get_default_device().type)),
}  # fmt: skip


def of_timm(name, checkpointing=False, **arguments):
    model = timm.create_model(name, num_classes=0, drop_path_rate=0.3, **arguments)
    model.set_grad_checkpointing(checkpointing)
    return model


BACKBONES = {
    **{name: lambda make=make: before_more(make()) for name, make in MIDDLES.items()},
    "BatchNorm and dropout": small,
    "no momentum": partial(small, momentum=None),
    "not affine": partial(small, affine=False),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()),
    "timm BatchNormAct": partial(of_timm, "test_efficientnet"),
    "timm SyncBatchNormAct": lambda: timm.layers.convert_sync_batchnorm(of_timm("test_efficientnet")),
    "timm ResNet": partial(of_timm, "test_resnet", drop_rate=0.2),
    "timm ViT": partial(of_timm, "test_vit", img_size=32),
    # Its statistics count twice, with chunks and without.
    "timm ResNet with checkpoints": partial(of_timm, "test_resnet", checkpointing=True),
    "timm ViT with checkpoints": partial(of_timm, "test_vit", checkpointing=True, img_size=32),
    "autocast to bfloat16": small,
    "autocast to float16": small,
}


def make(name):
    torch.manual_seed(0)
    in_float32 = name.startswith(("FakeQuantize", "autocast"))
    return BACKBONES[name]().train().to(torch.float32 if in_float32 else torch.float64)


def random_states():
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


@pytest.mark.parametrize(
    ("size", "chunk_size", "keep"),
    [(12, 4, 0), (12, 4, 2), (11, 4, 0), (11, 4, 1), (11, 4, 2), (11, 4, 3), (6, 6, 1), (5, 8, 1)],
)
@pytest.mark.parametrize("name", BACKBONES)
def test_features_gradients_and_state_are_those_of_the_chunks_run_plainly(name, size, chunk_size, keep):
    plain, chunked = make(name), ChunkedBackbone(make(name), chunk_size, keep=keep)
    images = [batch(size).to(next(plain.parameters()).dtype).requires_grad_() for _ in range(2)]
    dtype, features, states = torch.float16 if name.endswith("float16") else torch.bfloat16, [], []
    for run, own in zip((partial(one_after_the_other, plain, chunk_size=chunk_size), chunked), images, strict=True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        # In the backward pass it is another, as in the thread of a GPU.
        device = torch.device("meta" if name == "default device" else "cpu")
        with torch.autocast("cpu", dtype=dtype, enabled="autocast" in name), device:
            # Two passes before the first backward pass: the second changes the state once more.
            features.append([run(own), run(own)])
        states.append(random_states())
    assert_close(*features, rtol=0, atol=0)
    assert states[0] == states[1]
    assert_same(chunked, plain, rtol=0, atol=0)
    before = [*chunked.buffers()]
    for first, second in features:
        first.sin().sum().backward(retain_graph=True)
        second.square().sum().backward()
        first.sin().sum().backward()
    assert_close(images[1].grad, images[0].grad, rtol=0, atol=0)
    assert_same(chunked, plain, rtol=0, atol=0)
    # The backward pass puts back what it finds.
    assert random_states() == states[0]
    assert all(one is other for one, other in zip(chunked.buffers(), before, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("keep", "backward"), [(0, [2, 4, 4]), (1, [4, 4]), (2, [4]), (3, []), (9, [])])
def test_chunks_that_are_not_kept_hold_nothing_and_run_once_more_for_their_gradient(training, keep, backward):
    backbone, calls, held = small(), [], []
    backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    backbone[0].register_forward_hook(lambda module, args, maps: held.append(weakref.ref(maps)))
    net = APINet(backbone, 5, dim=8, chunk_size=4, keep_chunks=keep).double().train(training)
    logits = net(batch(10))
    assert calls == [4, 4, 2]
    assert [maps() is not None for maps in held] == [place >= 3 - keep for place in range(3)]
    if keep >= 3:  # then any change will do that autograd takes
        net.train(not training)
    logits.sum().backward()
    assert calls[3:] == backward


def test_a_large_buffer_that_does_not_change_is_copied_once():
    table = Calling(lambda maps: maps * table.weight[0, 0])
    table.register_buffer("weight", torch.ones(1000, 1000))
    backbone, copies = before_more(table), set()
    with Made(lambda tensor: copies.add(tensor.data_ptr()) if tensor.numel() == 10**6 else None):
        ChunkedBackbone(backbone, 2, keep=0)(batch(16).float())
    assert len(copies) == 1


@pytest.mark.parametrize("keep", [0, 1])
def test_other_outputs_than_one_tensor(keep):
    backbone = Calling(lambda x: {"maps": [x.exp(), x.mean((2, 3))], "features": x[:, 0], "stride": 4, "mask": None})
    images = [batch(10).requires_grad_() for _ in range(2)]
    outputs = backbone(images[0]), ChunkedBackbone(backbone, 4, keep=keep)(images[1])
    assert_close(*outputs, rtol=0, atol=0)
    for output in outputs:
        (output["features"].sum() + output["maps"][0].square().sum()).backward()
    assert torch.equal(images[1].grad, images[0].grad)


def by_autograd(loss):
    def gradients(parameters, images):
        own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss(own, images).backward()
        return {name: value.grad for name, value in own.items()}

    return gradients


TRANSFORMS = {
    "exchanged parameters": by_autograd,
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss), (None, 0)),
}


def loss_of(net, parameters, images):
    return torch.func.functional_call(net, parameters, (images,)).square().sum()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms_give_the_gradients_of_the_whole_batch(transform):
    # In train mode, torch refuses to update BatchNorm's statistics in a transform, with and without chunks.
    backbone, images = small().eval(), batch(10)
    in_chunks, whole = (partial(loss_of, ChunkedBackbone(backbone, size)) for size in (4, 10))
    parameters = {f"backbone.{name}": 1.5 * value.detach() for name, value in backbone.named_parameters()}
    found = TRANSFORMS[transform](in_chunks)(parameters, images[None] if "vmap" in transform else images)
    expected = by_autograd(whole)(parameters, images)
    assert_close({name: value.view_as(expected[name]) for name, value in found.items()}, expected)
    assert_close(*(torch.func.grad(loss, argnums=1)({}, images) for loss in (in_chunks, whole)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("inside", "outside"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_compiled_backbone_needs_one_graph_and_a_net_leaves_its_chunks_alone(backend, inside, outside, keep):
    plain, graphs = timm.create_model("test_resnet", num_classes=0).double(), CompileCounterWithBackend(backend)
    backbone = copy.deepcopy(plain)
    chunked = ChunkedBackbone(torch.compile(backbone, backend=graphs) if inside else backbone, 4, keep=keep)
    run = torch.compile(chunked, backend="aot_eager") if outside else chunked
    for size in (8, 10):  # of the second, the last chunk has another size
        one_after_the_other(plain, batch(size)).sum().backward()
        run(batch(size)).sum().backward()
    assert_same(backbone, plain)
    assert graphs.frame_count == inside


WEIGHT = r"weight \[6, 3, 3, 3\] of the backbone's Conv2d was"
BEFORE = "between the forward pass and its backward pass"
OTHERS = r"autograd saved (\d+) tensors in the forward pass, then (?!\1)\d+, or some of other"
CHANGES = {
    "eval": (lambda net, _: net.eval(), "was in train mode in the forward pass and is not in its backward pass"),
    "one module's eval": (lambda net, _: net[1].eval(), "BatchNorm2d of the backbone was in train mode in the forward"),
    "step": (lambda net, _: torch.optim.SGD(net.parameters(), lr=0.1).step(), f"{WEIGHT} changed {BEFORE}"),
    "exchange": (lambda net, _: setattr(net[0], "weight", nn.Parameter(net[0].weight)), f"{WEIGHT} exchanged {BEFORE}"),
    "forward": (lambda net, _: setattr(net[2], "forward", lambda maps: maps.exp().sin()), OTHERS),
    "images": (lambda _, images: images.mul_(2), rf"the images float64 \[2, 3, 32, 32\] on cpu were changed {BEFORE}"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_what_changes_before_the_backward_pass_is_named(change, message):
    net = ChunkedBackbone(small(), 4, keep=0)  # for kept chunks autograd itself refuses changed weights
    net(images := batch(10)).sum().backward()
    loss = net(images).sum()
    change(net.backbone, images)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()
    net.train()
    net(images).sum().backward()


ALONE = r"leaves a chunk of one image of float64 \[{}, 3, 32, 32\]"
JOINED = "cannot be joined over chunks: it has"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChunkedBackbone(small(), 4, keep=-1), "keep must be at least 0, got -1"),
        (lambda: APINet("test_resnet", 4, keep_chunks=-1), "keep_chunks must be at least 0, got -1"),
        (lambda: run_in_chunks(small(), batch(4), 0), "chunk_size must be at least 1, got 0"),  # as if set later
        (lambda: run_in_chunks(small(), batch(9), 4), f"chunk_size=4 {ALONE.format(9)}"),
        (lambda: run_in_chunks(small(), batch(3), 1), f"chunk_size=1 {ALONE.format(3)}"),
        (lambda: run_in_chunks(Calling(torch.mean), batch(6), 4), rf"{JOINED} float64 \[\] on cpu and float64"),
        (lambda: run_in_chunks(Calling(len), batch(6), 4), f"{JOINED} 4 and 2, where tensors"),
    ],
)
def test_errors_show_what_came(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("size", [9, 3])
def test_a_chunk_of_one_image_will_do_where_each_image_is_by_itself(size):
    # InstanceNorm has running statistics too.
    for backbone in (small().eval(), small(nn.InstanceNorm2d, track_running_stats=True)):
        assert run_in_chunks(backbone, batch(size), size // 2).shape == (size, 8)
