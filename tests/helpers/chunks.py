"""A batch in chunks, and its chunks one after the other: what the tests of `ChunkedBackbone` compare."""

import copy

import torch
from torch import nn

from apinet_head import ChunkedBackbone


def small(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), norm(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, 8, 3), norm(8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()  # fmt: skip


def batch(size):
    return torch.randn(size, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def one_after_the_other(backbone, images, chunk_size):
    return torch.cat([backbone(chunk) for chunk in images.split(chunk_size)])


def chunked_and_plain(backbone, chunk_size=4, keep=1):
    plain = copy.deepcopy(backbone)
    return (
        ChunkedBackbone(backbone, chunk_size, keep=keep),
        lambda images: one_after_the_other(plain, images, chunk_size),
        plain,
    )


def assert_same_gradients(chunked, plain):
    for (name, right), value in zip(plain.named_parameters(), chunked.backbone.parameters(), strict=True):
        assert torch.equal(value.grad, right.grad), name


def assert_same_statistics(chunked, plain):
    for (name, right), value in zip(plain.named_buffers(), chunked.backbone.buffers(), strict=True):
        assert torch.equal(value, right), name


def assert_near(net, plain):
    """Gradients and statistics of what is compiled, but for rounding."""
    gradients = [[parameter.grad for parameter in one.parameters()] for one in (net, plain)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close([*net.buffers()], [*plain.buffers()])
