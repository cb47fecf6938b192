"""Runs a batch through the backbone in chunks: the memory of one chunk, the gradient of the whole batch."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from apinet_head._checks import check_int, check_module, describe


class ChunkedBackbone(nn.Module):
    """Runs `backbone` on `chunk_size` images at a time, and recomputes all but the last chunks in the backward pass.

    Of a chunk that is recomputed only images and features are kept until then. Peak memory is that of `keep` chunks,
    and of one at least; the cost is another forward pass of the others. The last chunk is kept for nothing, because its
    backward pass comes first. Features and gradients are exactly those of the chunks one after the other: RNG state
    (dropout, drop-path) and autocast are restored for the recomputation. BatchNorm normalises each chunk by its own
    statistics, and its running statistics end as after one pass over the chunks. 8 chunks of 15 are what the published
    training computes on 8 GPUs.

    Without gradients nothing is recomputed. Compile the backbone, not this module, whose chunks `torch.compile` leaves
    alone (a last chunk of another size runs uncompiled, from PyTorch 2.6 on). Gradient checkpointing of the backbone's
    own counts its BatchNorm's running statistics twice, as it does without chunks. Under the transforms of `torch.func`
    and `functional_call`, gradients are the same, but no memory is saved.

    Args:
        backbone: maps images [B,...] to features [B,...], each image by itself but for BatchNorm; or to a tuple, list,
            dict or transformers output of such tensors.
        chunk_size: number of images in a chunk.
        keep: number of chunks, the last ones, that keep what they computed and are not run again.

    Raises:
        ValueError: chunk_size is below 1, or keep below 0.
        TypeError: chunk_size or keep is no int, or backbone no module.

    Examples:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> features = ChunkedBackbone(backbone, chunk_size=4)(torch.randn(12, 3, 16, 16))
        >>> features.sum().backward()
        >>> features.shape
        torch.Size([12, 8])
    """

    def __init__(self, backbone: nn.Module, chunk_size: int, *, keep: int = 1) -> None:
        super().__init__()
        check_module(backbone, "backbone")
        self.backbone = backbone
        self.chunk_size: int = check_int(chunk_size, "chunk_size", 1)
        self.keep: int = check_int(keep, "keep", 0)

    def forward(self, images: Tensor) -> Any:
        return run_in_chunks(self.backbone, images, self.chunk_size, self.keep)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, keep={self.keep}"


# The compiler cannot trace a checkpoint whose context manager restores the running statistics. torch.compiler.disable
# would import the compiler, which takes a second; this waits for the first call, as checkpoint itself does.
@_disable_dynamo
def run_in_chunks(backbone: nn.Module, images: Tensor, chunk_size: int, keep: int = 1) -> Any:
    """The functional form of `ChunkedBackbone`.

    Raises:
        ValueError: a chunk has one image and BatchNorm is in train mode, or the chunks' outputs cannot be concatenated.
        TypeError: images are not a tensor [B, ...].
    """
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise TypeError(f"images must be a tensor [B, ...] to go in chunks, got {describe(images)}")
    smallest = min(len(images), len(images) % chunk_size or chunk_size)
    if smallest == 1 and any(isinstance(module, _BatchNorm) and module.training for module in backbone.modules()):
        raise ValueError(
            f"chunk_size={chunk_size} leaves a chunk of one image of {describe(images)}, too few for BatchNorm in "
            "train mode: take another chunk_size or batch, or put BatchNorm in eval mode"
        )
    if len(images) <= chunk_size:
        return backbone(images)
    parameters = list(backbone.parameters())
    learns = torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in parameters))
    # torch.func allows no hooks on saved tensors; the parameters of functional_call are gone in the backward pass.
    functional = torch._C._are_functorch_transforms_active() or not all(isinstance(p, nn.Parameter) for p in parameters)

    chunks = torch.split(images, chunk_size)

    def run(place: int, chunk: Tensor) -> Any:
        if functional or not learns:
            return backbone(chunk)
        # A last chunk of another size would be compiled anew, maybe to a graph that saves other tensors than the first.
        function = backbone if len(chunk) == chunk_size else partial(_uncompiled, backbone)
        if place >= len(chunks) - keep:
            return function(chunk)
        contexts = nullcontext(), _RunningStatisticsKept(backbone)  # of the first pass, and of the recomputation
        return checkpoint(function, chunk, use_reentrant=False, context_fn=lambda: contexts)

    first, *others = [run(place, chunk) for place, chunk in enumerate(chunks)]
    return tree_map(_join, first, *others)


def _uncompiled(backbone: nn.Module, chunk: Tensor) -> Any:
    """Runs the backbone in eager mode even if it is compiled (PyTorch before 2.6 can't)."""
    with torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext():
        return backbone(chunk)


class _RunningStatisticsKept(AbstractContextManager[None]):
    """Restores BatchNorm's running statistics on exit: a recomputed chunk does not count in them again.

    A class, because it is entered again if the backward pass is repeated (`retain_graph=True`).
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def __enter__(self) -> None:
        self.kept = [
            (buffer, buffer.clone())
            for module in self.backbone.modules()
            if module.training
            for name in ("running_mean", "running_var", "num_batches_tracked")
            if (buffer := module._buffers.get(name)) is not None
        ]

    def __exit__(self, *_: object) -> None:
        for buffer, before in self.kept:
            # Through .data: autograd saved the buffer and would call this an in-place change, though in train mode the
            # backward pass does not read it.
            buffer.data.copy_(before)
        self.kept.clear()


def _join(*parts: Any) -> Any:
    """Concatenates one leaf of the backbone's output over the chunks; what is no tensor must be equal in all."""
    if all(isinstance(part, Tensor) and part.ndim for part in parts):
        return torch.cat(parts)
    if any(isinstance(part, Tensor) or part != parts[0] for part in parts):
        shown = " and ".join(describe(part) if isinstance(part, Tensor) else repr(part) for part in parts[:2])
        raise ValueError(
            f"the backbone's output cannot be joined over chunks: it has {shown}, where tensors [B, ...] were expected"
        )
    return parts[0]
