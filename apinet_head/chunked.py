"""A batch through the backbone chunk by chunk: the memory of one chunk, the gradient of the whole batch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from apinet_head.checks import describe


class ChunkedBackbone(nn.Module):
    """Runs `backbone` on `chunk_size` images at a time, and again when their gradient is due.

    Between forward and backward only the images and the features are kept, so that the peak of memory is that of one
    chunk, for one more forward pass. Features and gradients are exactly those of the chunks one after the other:
    dropout, drop-path and autocast are replayed. BatchNorm normalises each chunk by its own statistics, and its running
    statistics end as after one pass over the chunks. 8 chunks of 15 are what the published training computes on 8 GPUs.

    Args:
        backbone: any module that maps images [B,...] to one tensor [B,...], each image by itself but for BatchNorm.
        chunk_size: images at a time.

    Raises:
        ValueError: chunk_size is below 1.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> features = ChunkedBackbone(backbone, chunk_size=4)(torch.randn(12, 3, 16, 16))
        >>> features.sum().backward()
        >>> features.shape
        torch.Size([12, 8])
    """

    def __init__(self, backbone: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.chunk_size = check_chunk_size(chunk_size)

    def forward(self, images: Tensor) -> Tensor:
        return run_in_chunks(self.backbone, images, self.chunk_size)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"


def run_in_chunks(backbone: nn.Module, images: Tensor, chunk_size: int) -> Tensor:
    """What `ChunkedBackbone` does, without a module of its own.

    Raises:
        ValueError: a chunk would hold one image for BatchNorm to normalise by, or the backbone gives no tensor.
    """
    if len(images) <= chunk_size:
        return _features(backbone(images))
    left_over = len(images) % chunk_size or chunk_size
    if left_over == 1 and any(isinstance(module, _NormBase) and module.training for module in backbone.modules()):
        raise ValueError(
            f"chunk_size={chunk_size} leaves a chunk of one image of {describe(images)}, which BatchNorm in train mode "
            "would normalise by itself: take another chunk_size or batch, or put BatchNorm in eval mode"
        )
    # Where no gradient will come, there is nothing to keep, and nothing to compute a second time.
    learns = torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in backbone.parameters()))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _running_statistics_kept(backbone)

    def run(chunk: Tensor) -> Tensor:
        if not learns:
            return _features(backbone(chunk))
        return _features(checkpoint(backbone, chunk, use_reentrant=False, context_fn=contexts))

    return torch.cat([run(chunk) for chunk in torch.split(images, chunk_size)])


def check_chunk_size(chunk_size: int) -> int:
    """The size itself; ValueError if it is below 1."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def _running_statistics_kept(backbone: nn.Module) -> Iterator[None]:
    # The second pass over a chunk must not count in the running statistics again, so it counts in copies of them. (It
    # must have some: autograd notes them with the other tensors of the first pass, and both passes have to agree.)
    kept = [
        (module, name, buffer)
        for module in backbone.modules()
        if module.training
        for name in STATISTICS
        if (buffer := module._buffers.get(name)) is not None
    ]
    for module, name, buffer in kept:
        module._buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer


def _features(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(f"the backbone must give one tensor to run in chunks, got {type(output).__name__}")
    return output
