"""`ChunkedBackbone` against its chunks run one after the other, bit for bit in float64."""

import copy
import weakref

import pytest
import timm
import torch
from chunks import assert_same_gradients, assert_same_statistics, batch, chunked_and_plain, one_after_the_other, small
from torch import nn

from apinet_head import APINet, ChunkedBackbone, api_loss

BACKBONES = {
    "BatchNorm": small,
    "no momentum": lambda: small(lambda channels: nn.BatchNorm2d(channels, momentum=None)),
    "not affine": lambda: small(lambda channels: nn.BatchNorm2d(channels, affine=False)),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()),
    "timm BatchNormAct": lambda: timm.create_model("test_efficientnet", num_classes=0, drop_path_rate=0.3).double(),
    "timm SyncBatchNormAct": lambda: timm.layers.convert_sync_batchnorm(BACKBONES["timm BatchNormAct"]()),
    "timm ResNet": lambda: timm.create_model("test_resnet", num_classes=0, drop_path_rate=0.3, drop_rate=0.2).double(),
    "timm ViT": lambda: timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3, img_size=32).double(),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    ("size", "chunk_size", "keep"),
    [(12, 4, 0), (12, 4, 1), (12, 4, 2), (11, 4, 0), (11, 4, 1), (11, 4, 2), (11, 4, 3), (6, 6, 1), (5, 8, 1)],
)
def test_features_gradients_and_statistics(name, size, chunk_size, keep):
    plain = BACKBONES[name]().train()
    chunked = ChunkedBackbone(copy.deepcopy(plain), chunk_size, keep=keep)
    images = [batch(size).requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    expected = one_after_the_other(plain, images[0], chunk_size)
    torch.manual_seed(1)
    found = chunked(images[1])
    assert torch.equal(found, expected)

    weight = torch.randn_like(expected)
    (expected.sin() * weight).sum().backward()
    (found.sin() * weight).sum().backward()
    assert torch.equal(images[1].grad, images[0].grad)
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


def test_without_batch_norm_it_is_the_whole_batch():
    plain = small(lambda channels: nn.GroupNorm(2, channels)).eval()
    chunked = ChunkedBackbone(copy.deepcopy(plain), 3)
    expected, found = plain(batch(10)), chunked(batch(10))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), chunked.parameters()),
        torch.autograd.grad(expected.sum(), plain.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_two_backward_passes_through_one_graph(keep):
    chunked, reference, plain = chunked_and_plain(small(), keep=keep)
    for run in (chunked, reference):
        torch.manual_seed(1)
        loss = run(batch(10)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


def test_beside_a_pass_of_the_same_backbone_without_chunks():
    # Both graphs hold the running statistics; keeping them for one must not look like a change to the other.
    chunked, reference, plain = chunked_and_plain(small())
    for run, backbone in ((chunked, chunked.backbone), (reference, plain)):
        torch.manual_seed(1)
        (backbone(batch(6)).square().sum() + run(batch(10)).square().sum()).backward()
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


class Counting(nn.Module):
    """Counts its calls, and how many images they held."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = small(), []

    def forward(self, images):
        self.calls.append(len(images))
        return self.net(images)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("keep", "backward"), [(0, [2, 4, 4]), (1, [4, 4]), (2, [4]), (3, []), (9, [])])
def test_chunks_that_are_not_kept_run_once_more_for_their_gradient(mode, keep, backward):
    counting = Counting().train(mode == "train")
    features = ChunkedBackbone(counting, 4, keep=keep)(batch(10))
    assert counting.calls == [4, 4, 2]
    features.sum().backward()
    assert counting.calls[3:] == backward


def test_a_frozen_backbone_runs_once():
    counting = Counting().requires_grad_(False)
    assert not ChunkedBackbone(counting, 4)(batch(10)).requires_grad
    assert counting.calls == [4, 4, 2]


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_only_kept_chunks_hold_what_they_computed(keep):
    held = []

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()).double())

        def forward(self, images):
            maps = images * self.weight
            held.append(weakref.ref(maps))
            return maps.exp().mean((1, 2, 3)) * maps.square().mean((1, 2, 3))

    features = ChunkedBackbone(Holding(), 4, keep=keep)(batch(12))
    assert [one() is not None for one in held] == [place >= 3 - keep for place in range(3)]
    assert features.requires_grad


def test_without_gradient_nothing_runs_twice():
    counting = Counting()
    with torch.no_grad():
        assert not ChunkedBackbone(counting, 4)(batch(10)).requires_grad
    assert counting.calls == [4, 4, 2]


@pytest.mark.parametrize("keep", [{}, {"keep_chunks": 0}, {"keep_chunks": 2}])
def test_apinet_in_chunks_has_the_same_names_and_gradients(keep):
    torch.manual_seed(0)
    whole = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}).double()
    chunked = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}, chunk_size=3, **keep).double()
    chunked.load_state_dict(whole.state_dict())
    labels = torch.arange(8) % 4
    losses = [api_loss(net(batch(8), labels)) for net in (whole, chunked)]
    torch.testing.assert_close(*losses)
    gradients = [
        torch.autograd.grad(loss, net.parameters()) for loss, net in zip(losses, (whole, chunked), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert chunked.eval()(batch(8)).shape == (8, 4)


def test_other_outputs_than_one_tensor():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()

        def forward(self, images):
            maps = self.net[:3](images)
            return {"maps": [maps, maps.mean((2, 3))], "features": self.net[3:](maps), "stride": 4, "mask": None}

    chunked, _, plain = chunked_and_plain(Pyramid())
    torch.manual_seed(1)
    parts = [plain(chunk) for chunk in batch(10).split(4)]
    torch.manual_seed(1)
    found = chunked(batch(10))
    assert (found["stride"], found["mask"]) == (4, None)
    features = torch.cat([part["features"] for part in parts])
    maps = [torch.cat(pieces) for pieces in zip(*(part["maps"] for part in parts), strict=True)]
    assert torch.equal(found["features"], features)
    assert all(torch.equal(one, other) for one, other in zip(found["maps"], maps, strict=True))
    (features.sum() + maps[1].square().sum()).backward()
    (found["features"].sum() + found["maps"][1].square().sum()).backward()
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


class Returning(nn.Module):
    """Gives what `make` makes of the images, without weights."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def test_errors_show_what_came():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ChunkedBackbone(small(), 0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        APINet("test_resnet", 4, chunk_size=0)
    net = APINet("test_resnet", 4, chunk_size=2)
    net.chunk_size = 0
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        net(batch(4).float())
    with pytest.raises(ValueError, match="keep must be at least 0, got -1"):
        ChunkedBackbone(small(), 4, keep=-1)
    with pytest.raises(ValueError, match="keep_chunks must be at least 0, got -1"):
        APINet("test_resnet", 4, chunk_size=2, keep_chunks=-1)
    for size, chunk_size in ((9, 4), (3, 1)):
        message = rf"chunk_size={chunk_size} leaves a chunk of one image of float64 \[{size}, 3, 32, 32\]"
        with pytest.raises(ValueError, match=message):
            ChunkedBackbone(small(), chunk_size)(batch(size))
        assert ChunkedBackbone(small().eval(), chunk_size)(batch(size)).shape == (size, 8)
        # InstanceNorm has running statistics too, but looks at each image by itself.
        alone = small(lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True))
        assert ChunkedBackbone(alone, chunk_size)(batch(size)).shape == (size, 8)

    with pytest.raises(ValueError, match=r"cannot be joined over chunks: it has float64 \[\] on cpu and float64"):
        ChunkedBackbone(Returning(lambda images: images.mean()), 4)(batch(8))
    with pytest.raises(ValueError, match=r"cannot be joined over chunks: it has 4 and 2, where tensors"):
        ChunkedBackbone(Returning(len), 4)(batch(6))
    with pytest.raises(TypeError, match=r"features must be a tensor \[B, D\], got tuple"):
        APINet(Returning(lambda images: (images, images)), 4, dim=3, chunk_size=4)(batch(8))
