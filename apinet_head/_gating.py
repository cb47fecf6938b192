"""Gates of pairs of images, and the images under them (paper, equations 2 to 6).

    g = sigmoid(m * x)        own gate: x + x * g_own        other gate: x + x * g_other

The images of P pairs are rows of a table [N,D], rows [2,P] of anchors and partners, which take less memory to store
than the images [2,P,D]. The backward pass is written by hand, and computes images and gates again: they are cheap to
compute, and several times the memory of the features to store.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def take(table: Tensor, rows: Tensor) -> Tensor:
    """[2,P,D]; index_select has a faster backward pass than indexing."""
    return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])


def gates_of(images: Tensor, mutual: Tensor, single: bool) -> Tensor:
    """Gates [2,P,D] of images [2,P,D] and the mutual vectors [P,D] of the pairs; sigmoid(m) for both if `single`."""
    return torch.sigmoid(mutual.expand_as(images) if single else mutual * images)


def gated_features(table: Tensor, rows: Tensor, mutual: Tensor, single: bool) -> Tensor:
    """Gated features [G,2P,D] of all images: under their own gates and, unless `single`, under each other's."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _gated(table, rows, mutual, single)  # torch.func and forward mode need more than a backward pass
    gated: Tensor = _Gated.apply(table, rows, mutual, single)
    return gated


def _gated(table: Tensor, rows: Tensor, mutual: Tensor, single: bool) -> Tensor:
    images = take(table, rows)
    gates = gates_of(images, mutual, single)
    # flip(0) swaps the gates of anchors and partners.
    of_each = [gates] if single else [gates, gates.flip(0)]
    # x + x * g, without broadcasting, whose backward pass would need a sum.
    return torch.stack([torch.addcmul(images, images, gate).flatten(0, 1) for gate in of_each])


class _Gated(torch.autograd.Function):
    """`_gated`, of which the backward pass keeps the arguments alone; it is differentiable itself."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, mutual: Tensor, single: bool) -> Tensor:
        ctx.save_for_backward(table, rows, mutual)
        return _gated(table, rows, mutual, single)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        table, rows, mutual = ctx.saved_tensors
        images, single = take(table, rows), gradient.shape[0] == 1
        gates = gates_of(images, mutual, single)
        # x + x * g: to x goes the gradient times 1 + g, to g the gradient times x.
        own, *others = gradient.reshape(len(gradient), *images.shape).unbind()
        of_images, of_gates = torch.addcmul(own, own, gates), own * images
        for other in others:  # flip(0): the image of a gate is the pair's other one
            of_images = torch.addcmul(of_images + other, other, gates.flip(0))
            of_gates = torch.addcmul(of_gates, other.flip(0), images.flip(0))
        of_inner = torch.ops.aten.sigmoid_backward(of_gates, gates)  # of m, or m * x
        if single:
            of_mutual = of_inner.sum(0)
        else:
            of_mutual = (of_inner * images).sum(0)
            of_images = torch.addcmul(of_images, of_inner, mutual.expand_as(images))
        of_table = torch.zeros_like(table).index_add(0, rows.flatten(), of_images.flatten(0, 1).to(table.dtype))
        return of_table, None, of_mutual.to(mutual.dtype), None
