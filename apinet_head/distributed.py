"""One batch across many ranks: a differentiable all-gather of features."""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from apinet_head._checks import FLOATS, check_features, check_labels

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


# Ranks exchange dtypes as indices into this list.
DTYPES = [*FLOATS, *(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))]


def gather_features(
    features: Tensor, labels: Tensor, *, group: "dist.ProcessGroup | DeviceMesh | None" = None
) -> tuple[Tensor, Tensor, int]:
    """Differentiable all-gather of features and labels, in the order of the ranks.

    The gradient of a rank's features is the sum of all ranks' gradients for them, so all ranks must call this and run
    the backward pass. With one process, the arguments are returned unchanged.

    Ranks that hold the same images, as in tensor parallelism, must be in different groups, else each image finds its
    own copy. Ranks compare shapes and dtypes first, so that a mismatch is an error instead of a hang; this does not
    wait for the device if the group also has a CPU backend (`"cpu:gloo,cuda:nccl"`).

    Args:
        features: [B,D], floating point; shape and dtype the same on all ranks.
        labels: [B], class indices; integer dtype, the same on all ranks.
        group: a ProcessGroup or a one-dimensional DeviceMesh, such as `mesh["dp"]`; None for the default group.

    Returns:
        all_features [W*B,D] and all_labels [W*B] of W ranks, and the row of this rank's first image.

    Raises:
        ValueError: features or labels are malformed; shapes, dtypes or requires_grad differ between ranks (raised on
            every rank); or this process is not in the group.
        TypeError: an argument has the wrong type.

    Examples:
        >>> features, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
        >>> all_features, all_labels, offset = gather_features(features, labels)  # here: one process
        >>> all_features.shape, offset
        (torch.Size([4, 8]), 0)
    """
    check_features(features)
    check_labels(labels, features)
    return gather_checked(features, labels, None if group is None else group_name(group))


# Inside the package a group goes by its name: a ProcessGroup itself can be neither copied nor pickled.


def gather_checked(features: Tensor, labels: Tensor, group: str | None = None) -> tuple[Tensor, Tensor, int]:
    """`gather_features` without the argument checks."""
    if world_size(group) == 1:
        return features, labels, 0
    process_group = _find_group(group)
    _check_equal(features, labels, process_group)
    all_features: Tensor = _Gather.apply(features, process_group)
    return all_features, _gather(labels, process_group), dist.get_rank(process_group) * features.shape[0]


def world_size(group: str | None = None) -> int:
    """Number of ranks of the group; 1 without torch.distributed."""
    return dist.get_world_size(_find_group(group)) if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(number: Tensor, group: str | None = None) -> Tensor:
    """The mean over ranks of a scalar, in float64 if that is an integer."""
    total = number.clone()
    dist.all_reduce(total, group=_find_group(group))
    return (total if total.is_floating_point() else total.double()) / world_size(group)


def group_name(group: "dist.ProcessGroup | DeviceMesh") -> str:
    """The name of a ProcessGroup, or of that of a one-dimensional DeviceMesh."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group: call this only on ranks that are")
    if not isinstance(group, dist.ProcessGroup) and hasattr(group, "get_group"):
        group = group.get_group()  # raises for a mesh of several dimensions
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    return group.group_name


def _find_group(name: str | None) -> "dist.ProcessGroup | None":
    group: dist.ProcessGroup | None = None
    if name is not None:
        group = cast(Any, dist.distributed_c10d)._resolve_process_group(name)
    return group


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
        # gloo does not have reduce_scatter for every device. A group may have a backend for each type of device.
        if f"{gradient.device.type}:gloo" in str(dist.get_backend_config(ctx.group)):
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
    """Raise ValueError on every rank if the ranks differ; a rank that did not raise would wait for the others."""
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
