"""`ChunkedBackbone` against its chunks run one after the other, bit for bit in float64."""

import copy

import pytest
import timm
import torch
from torch import nn

from apinet_head import APINet, ChunkedBackbone, api_loss


def small(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 8, 3), norm(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()  # fmt: skip


BACKBONES = {
    "BatchNorm": small,
    "no momentum": lambda: small(lambda channels: nn.BatchNorm2d(channels, momentum=None)),
    "not affine": lambda: small(lambda channels: nn.BatchNorm2d(channels, affine=False)),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(small()),
    "timm BatchNormAct": lambda: timm.create_model("test_efficientnet", num_classes=0, drop_path_rate=0.3).double(),
    "timm ResNet": lambda: timm.create_model("test_resnet", num_classes=0, drop_path_rate=0.3, drop_rate=0.2).double(),
    "timm ViT": lambda: timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3, img_size=32).double(),
}


def batch(size):
    return torch.randn(size, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def one_after_the_other(backbone, images, chunk_size):
    return torch.cat([backbone(chunk) for chunk in images.split(chunk_size)])


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("size", "chunk_size"), [(12, 4), (11, 4), (6, 6), (5, 8)])
def test_features_gradients_and_statistics(name, size, chunk_size):
    plain = BACKBONES[name]().train()
    chunked = ChunkedBackbone(copy.deepcopy(plain), chunk_size)
    if name == "SyncBatchNorm":  # which runs on a GPU alone
        plain, chunked.backbone = plain.eval(), chunked.backbone.eval()
    images = [batch(size).requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    expected = one_after_the_other(plain, images[0], chunk_size)
    torch.manual_seed(1)
    found = chunked(images[1])
    assert torch.equal(found, expected)

    weight = torch.randn_like(expected)
    (expected.sin() * weight).sum().backward()
    (found.sin() * weight).sum().backward()
    for (key, right), value in zip(plain.named_parameters(), chunked.backbone.parameters(), strict=True):
        assert torch.equal(value.grad, right.grad), key
    assert torch.equal(images[1].grad, images[0].grad)
    for (key, right), value in zip(plain.named_buffers(), chunked.backbone.buffers(), strict=True):
        assert torch.equal(value, right), key


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


class Counting(nn.Module):
    """Counts its calls, and how many images they held."""

    def __init__(self):
        super().__init__()
        self.net, self.calls = small(), []

    def forward(self, images):
        self.calls.append(len(images))
        return self.net(images)


@pytest.mark.parametrize(
    ("prepare", "forward", "backward"),
    [
        (lambda module: module, [4, 4, 2], [2, 4, 4]),
        (lambda module: module.requires_grad_(False), [4, 4, 2], None),
        (lambda module: module.eval(), [4, 4, 2], [2, 4, 4]),
    ],
)
def test_each_chunk_runs_once_more_for_its_gradient_and_only_then(prepare, forward, backward):
    counting = prepare(Counting())
    features = ChunkedBackbone(counting, 4)(batch(10))
    assert counting.calls == forward
    assert features.requires_grad == (backward is not None)
    if backward:
        features.sum().backward()
        assert counting.calls[3:] == backward


def test_without_gradient_nothing_runs_twice():
    counting = Counting()
    with torch.no_grad():
        assert not ChunkedBackbone(counting, 4)(batch(10)).requires_grad
    assert counting.calls == [4, 4, 2]


def test_autocast_is_replayed():
    backbone = small().float()
    plain = copy.deepcopy(backbone)
    images = batch(8).float()
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = one_after_the_other(plain, images, 4)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ChunkedBackbone(backbone, 4)(images)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    expected.float().sum().backward()
    for one, other in zip(backbone.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_gradients_accumulate_over_steps():
    plain = small()
    chunked = ChunkedBackbone(copy.deepcopy(plain), 3)
    for size in (6, 9):
        torch.manual_seed(size)
        one_after_the_other(plain, batch(size), 3).sum().backward()
        torch.manual_seed(size)
        chunked(batch(size)).sum().backward()
    for one, other in zip(plain.parameters(), chunked.backbone.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_apinet_in_chunks_has_the_same_names_and_gradients():
    torch.manual_seed(0)
    whole = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}).double()
    chunked = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}, chunk_size=3).double()
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


def test_errors_show_what_came():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ChunkedBackbone(small(), 0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        APINet("test_resnet", 4, chunk_size=0)
    with pytest.raises(ValueError, match=r"chunk_size=4 leaves a chunk of one image of float64 \[9, 3, 32, 32\]"):
        ChunkedBackbone(small(), 4)(batch(9))
    assert ChunkedBackbone(small().eval(), 4)(batch(9)).shape == (9, 8)

    class Pair(nn.Module):
        def forward(self, images):
            return images, images

    with pytest.raises(ValueError, match="one tensor to run in chunks, got tuple"):
        ChunkedBackbone(Pair(), 4)(batch(8))
