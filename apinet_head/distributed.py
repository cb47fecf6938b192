"""One batch across many ranks: the features of all of them, and gradients that find their way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apinet_head._checks import check_features, check_labels


def gather_features(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """The features and labels of all ranks of the default process group, in the order of the ranks.

    Differentiable: a rank's features receive the sum of the gradients that all ranks have for them. All ranks must
    call this, forward and backward. Without a process group, or alone in it, the arguments come back as they are.

    The ranks tell each other the shapes first, so that a rank with another batch is an error instead of a hang. The
    host waits for those two numbers; where the group has a backend for the CPU as well, as
    `init_process_group("cpu:gloo,cuda:nccl")` makes one, it doesn't wait for the device.

    Args:
        features: [B,D], floating point, B and D the same on all ranks.
        labels: [B], class indices of any integer dtype.

    Returns:
        all_features [W*B,D] and all_labels [W*B] of W ranks, and the row of the first of this rank's own.

    Raises:
        ValueError: features or labels are malformed, or their shapes differ between ranks; then on every rank, with
            the shapes of all.

    Examples:
        >>> features, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
        >>> all_features, all_labels, offset = gather_features(features, labels)  # here: one process
        >>> all_features.shape, offset
        (torch.Size([4, 8]), 0)
    """
    check_features(features)
    check_labels(labels, features)
    if world_size() == 1:
        return features, labels, 0
    _check_shapes(features)
    all_features: Tensor = _Gather.apply(features)
    return all_features, _gather(labels), dist.get_rank() * features.shape[0]


class _Gather(torch.autograd.Function):
    """all_gather, and for its gradient the sum over the ranks of what each has for this one's rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return _gather(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        parts = list(gradient.contiguous().chunk(world_size()))
        if dist.get_backend() == "gloo":  # which in older versions of torch has no reduce_scatter
            total = torch.cat(parts)
            dist.all_reduce(total)
            return total.chunk(world_size())[dist.get_rank()]
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts)
        return own


def _gather(rows: Tensor) -> Tensor:
    everything = rows.new_empty(world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(everything.chunk(world_size())), rows.detach().contiguous())
    return everything


def world_size() -> int:
    """The number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(count: Tensor) -> Tensor:
    """The mean over all ranks of an integer scalar, in float64; a sum of 0 counts as 1, to divide by."""
    total = count.clone()
    dist.all_reduce(total)
    return total.clamp(min=1).double() / world_size()


def _check_shapes(features: Tensor) -> None:
    """ValueError on every rank if the shapes differ: one that raised alone would leave the others waiting for it."""
    device = "cpu" if "cpu:" in str(dist.get_backend_config()) else features.device
    own = torch.tensor(features.shape, device=device)
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    shapes = torch.stack(gathered).tolist()
    if any(shape != shapes[0] for shape in shapes):
        listing = ", ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ValueError(
            f"all ranks must have features of one shape to mine over all of them, got {listing}: give each the same "
            "number of images (BalancedBatchSampler does; else drop_last=True)"
        )
