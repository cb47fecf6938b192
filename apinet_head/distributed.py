"""One batch across many ranks: a differentiable all-gather of features."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apinet_head._checks import FLOATS, check_features, check_labels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group = dist.ProcessGroup | DeviceMesh | None

# Ranks tell each other their dtypes as numbers: places in this list.
DTYPES = [*FLOATS, *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))]


def gather_features(features: Tensor, labels: Tensor, *, group: "Group" = None) -> tuple[Tensor, Tensor, int]:
    """All-gather of features and labels over the ranks of a process group, in the order of the ranks.

    Differentiable: the gradient of a rank's features is the sum of the gradients that all ranks have for them. All
    ranks must call this, and run its backward pass. With one process, the arguments are returned as they are.

    Ranks that hold the same images, as in tensor parallelism, must not be in one group: each image would find its own
    copy. Pass the group, or the dimension of the device mesh, over which the data is split.

    Ranks compare shapes and dtypes first, so that a difference is an error instead of a hang. The host waits for these
    few numbers, but not for the device if the group has a CPU backend too (`init_process_group("cpu:gloo,cuda:nccl")`).

    Args:
        features: [B,D], floating point; shape and dtype the same on all ranks.
        labels: [B], class indices of an integer dtype, the same on all ranks.
        group: a ProcessGroup or a one-dimensional DeviceMesh, such as `mesh["dp"]`; None for the default group.

    Returns:
        all_features [W*B,D] and all_labels [W*B] of W ranks, and the row of this rank's first image.

    Raises:
        ValueError: features or labels are malformed; shapes, dtypes or the need of a gradient differ between ranks
            (raised on every rank); or this process is not in the group.
        TypeError: an argument is of the wrong type.

    Examples:
        >>> features, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
        >>> all_features, all_labels, offset = gather_features(features, labels)  # here: one process
        >>> all_features.shape, offset
        (torch.Size([4, 8]), 0)
    """
    check_features(features)
    check_labels(labels, features)
    return gather_checked(features, labels, group)


def gather_checked(features: Tensor, labels: Tensor, group: "Group" = None) -> tuple[Tensor, Tensor, int]:
    """`gather_features` without the checks of the arguments."""
    if world_size(group) == 1:
        return features, labels, 0
    process_group = _process_group(group)
    _check_equal(features, labels, process_group)
    all_features: Tensor = _Gather.apply(features, process_group)
    return all_features, _gather(labels, process_group), dist.get_rank(process_group) * features.shape[0]


def world_size(group: "Group" = None) -> int:
    """The number of ranks of the group; 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(_process_group(group))


def mean_over_ranks(count: Tensor, group: "Group" = None) -> Tensor:
    """The mean over ranks of an integer scalar, in float64, as a divisor: a sum of 0 counts as 1."""
    total = count.clone()
    dist.all_reduce(total, group=_process_group(group))
    return total.clamp(min=1).double() / world_size(group)


def _process_group(group: "Group") -> "dist.ProcessGroup | None":
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group: call this only on ranks that are")
    if not hasattr(group, "get_group"):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group.get_group()  # which refuses a mesh of several dimensions


class _Gather(torch.autograd.Function):
    """all_gather; the backward pass sums the ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
        ctx.group = group
        return _gather(features, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = list(gradient.contiguous().chunk(dist.get_world_size(ctx.group)))
        if dist.get_backend(ctx.group) == "gloo":  # which in older versions of torch has no reduce_scatter
            total = torch.cat(parts)
            dist.all_reduce(total, group=ctx.group)
            return total.chunk(len(parts))[dist.get_rank(ctx.group)], None
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own, None


def _gather(rows: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    ranks = dist.get_world_size(group)
    everything = rows.new_empty(ranks * rows.shape[0], *rows.shape[1:])
    dist.all_gather(list(everything.chunk(ranks)), rows.detach().contiguous(), group=group)
    return everything


def _check_equal(features: Tensor, labels: Tensor, group: "dist.ProcessGroup | None") -> None:
    """ValueError on every rank if the ranks differ: those that didn't raise would wait for the others."""
    device = "cpu" if "cpu:" in str(dist.get_backend_config(group)) else features.device
    learns = features.requires_grad and torch.is_grad_enabled()
    dtypes = (DTYPES.index(features.dtype), DTYPES.index(labels.dtype))
    own = torch.tensor([*features.shape, *dtypes, learns], device=device)
    found = _gather(own[None], group).tolist()
    if all(rank == found[0] for rank in found):
        return
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    listing = ", ".join(
        f"{names[dtype]} {shape} with{'' if learns else 'out'} gradient and {names[label_dtype]} labels on rank {rank}"
        for rank, (*shape, dtype, label_dtype, learns) in enumerate(found)
    )
    raise ValueError(
        f"all ranks must have features of one shape and dtype, got {listing}: give each the same number of images "
        "(BalancedBatchSampler does; else drop_last=True) and the same dtypes"
    )
