"""How much memory a training step takes, and which chunk size fits a GPU: told in advance, without that GPU.

The estimates add up tensors; nothing is run on a device. `examples/cub/train.py --chunk-size auto` uses them.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apinet_head._checks import check_int, check_module, check_number
from apinet_head._fake_step import Loss, fake_copy, peak_of_step
from apinet_head.loss import api_loss


class StepMemory(NamedTuple):
    """Bytes at the peak of a training step.

    Attributes:
        total: the sum of all that follows.
        parameters: parameters and buffers.
        gradients: of the parameters that learn; those of the step before until `zero_grad()`, then this step's.
        optimizer: what the optimiser keeps from step to step.
        activations: the rest: images, features, what forward keeps for backward, and what comes and goes.
    """

    total: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(amount)}" for name, amount in zip(self._fields[1:], self[1:], strict=True))
        return f"{gib(self.total)}: {parts}"


class ChunkChoice(NamedTuple):
    """A chunk size; `str()` says why that one.

    Attributes:
        chunk_size: for `APINet(chunk_size=...)`; None for the whole batch.
        batch_size: images in a step.
        needed: bytes that a step takes, for each chunk size that was looked at.
        budget: bytes that it may take: `memory` less the margin.
        memory: bytes that there are.
    """

    chunk_size: int | None
    batch_size: int
    needed: dict[int | None, int]
    budget: int
    memory: int

    def __str__(self) -> str:
        chunks = "the whole batch"
        if self.chunk_size is not None:
            count, uneven = -(-self.batch_size // self.chunk_size), self.batch_size % self.chunk_size
            chunks = f"{count} chunks of {'up to ' if uneven else ''}{self.chunk_size}"
        needed = gib(self.needed[self.chunk_size])
        others = {size: amount for size, amount in self.needed.items() if size != self.chunk_size}
        return (
            f"{chunks} for a batch of {self.batch_size}: {needed} by estimate, of {gib(self.budget)} to be used "
            f"({gib(self.memory)} less the margin)" + "".join(f"; {line}" for line in _lines(others))
        )


def step_memory(
    net: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, ...],
    *,
    chunk_size: int | None = None,
    amp: torch.dtype | None = None,
    moments: int = 1,
    loss: Loss | None = None,
) -> StepMemory:
    """Estimate the peak of memory of a training step: forward, loss, `zero_grad()`, backward.

    The step runs on fake tensors, which have shapes but no data, while torch's own `MemTracker`
    adds up those that are alive. Parameters, gradients and the optimiser's state count. What is no tensor doesn't: the
    CUDA context, workspaces of cuDNN and cuBLAS, fragmentation of the allocator. Nor do tensors that a step doesn't
    make itself: DDP's buckets (the gradients once more), images loaded ahead, the optimiser's passing copies.

    Args:
        net: an `APINet`, or any module together with `loss`; on any device, "meta" included. It stays as it is.
            Parameters that don't learn, and BatchNorm that `freeze_backbone` fixed, count as such.
        batch_size: images in a step on one device.
        image_size: S of images [3,S,S]; or the shape of an image.
        chunk_size: in place of that of the `APINet`, or of the `ChunkedBackbone` in the net; None for the whole batch.
        amp: the dtype of autocast, torch.bfloat16 or torch.float16; None for none. Of the operations that stay in
            float32 on CUDA, the modules LayerNorm, GroupNorm and Softmax are known; where softmax is called as a
            function, the estimate comes out too low.
        moments: tensors of a parameter's size that the optimiser keeps for it: 1 for SGD with momentum, 2 for Adam.
        loss: a function of net, images and labels; None for `api_loss(net(images, labels))`.

    Raises:
        ValueError: a number is out of its range, the net has no chunks to set the size of, or it reads values of
            tensors, which fake ones don't have.
        TypeError: net is no module, or a size or number no int.
        RuntimeError: this torch has no MemTracker.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(300, 100))
        >>> step_memory(net, 8, 10, moments=2, loss=lambda net, images, labels: net(images).sum())
        StepMemory(total=494468, parameters=120400, gradients=120400, optimizer=240800, activations=12868)
    """
    check_module(net, "net")
    check_int(batch_size, "batch_size", 1)
    check_int(moments, "moments", 0)
    shape = tuple(image_size) if isinstance(image_size, (tuple, list)) else (3, image_size, image_size)
    for side in shape:
        check_int(side, "image_size", 1)
    if chunk_size is not None:
        check_int(chunk_size, "chunk_size", 1)
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be torch.bfloat16, torch.float16 or None, got {amp!r}")
    peak, fixed, gradients = peak_of_step(net, (batch_size, *shape), chunk_size, amp, loss or _api_loss)
    optimizer = moments * gradients
    return StepMemory(peak + optimizer, fixed, gradients, optimizer, peak - fixed - gradients)


def pick_chunk_size(
    net: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, ...],
    *,
    memory: int | None = None,
    margin: float = 0.15,
    amp: torch.dtype | None = None,
    moments: int = 1,
    loss: Loss | None = None,
) -> ChunkChoice:
    """The chunk size with which a training step fits into `memory`, without trying on the device.

    The whole batch if that fits; else the fewest chunks that do, as even as can be. A size that leaves one image to a
    chunk is passed over where BatchNorm would have to normalise that image by itself.

    Args:
        net: as the arguments below, for `step_memory`, which is asked for a few chunk sizes.
        batch_size: see there.
        image_size: see there.
        memory: bytes for the step, parameters included; None for what the current CUDA device has left for this
            process, which is to be asked before the net is there.
        margin: share of `memory` to leave alone, for what `step_memory` doesn't count. 15 % is a guess, not yet
            measured on a GPU: a chunk that is a little too small costs hardly any time, one that is too large the run.
        amp: see there.
        moments: see there.
        loss: see there.

    Raises:
        ValueError: no chunk size fits, or memory is None without a CUDA device; or as in `step_memory`.
        TypeError: memory or margin is no number; or as in `step_memory`.
        RuntimeError: as in `step_memory`.

    Examples:
        >>> from apinet_head import APINet
        >>> net = APINet("resnet18", num_classes=10)
        >>> pick_chunk_size(net, batch_size=32, image_size=64, memory=200 * 2**20).chunk_size
        7
    """
    check_number(margin, "margin")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be a share in [0, 1), got {margin}")
    memory = _free_memory() if memory is None else memory
    check_number(memory, "memory", 0)
    budget = int(memory * (1 - margin))
    needed: dict[int | None, int] = {}

    def need(chunk_size: int | None) -> StepMemory:
        step = step_memory(net, batch_size, image_size, chunk_size=chunk_size, amp=amp, moments=moments, loss=loss)
        needed[chunk_size] = step.total
        return step

    whole = need(None)
    if whole.total <= budget:
        return ChunkChoice(None, batch_size, needed, budget, memory)
    sizes = _sizes(batch_size, _has_batch_norm(net))
    # Memory grows with the chunk, nearly on a straight line: look where the line between the largest size known to
    # fit and the smallest known not to meets the budget.
    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] don't
    fits, fails = (0, whole.total - whole.activations), (batch_size, whole.total)
    while low < high:
        slope = (fails[0] - fits[0]) / (fails[1] - fits[1])
        guess = bisect_right(sizes, fits[0] + slope * (budget - fits[1])) - 1
        middle = min(max(guess, low), high - 1)
        point = sizes[middle], need(sizes[middle]).total
        if point[1] <= budget:
            low, fits = middle + 1, point
        else:
            high, fails = middle, point
    if low == 0:
        raise ValueError(
            f"no chunk size brings a batch of {batch_size} into {gib(budget)} ({gib(memory)} less the margin). By "
            f"estimate, {', '.join(_lines(needed))}. Take mixed precision (amp), smaller images, net or batch"
        )
    return ChunkChoice(sizes[low - 1], batch_size, needed, budget, memory)


def gib(amount: int) -> str:
    """Bytes for people: "7.87 GiB", and in MiB what is below 0.1 GiB."""
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 / 10 else f"{amount / 2**20:.2f} MiB"


def _api_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return api_loss(net(images, labels))


def _sizes(batch_size: int, batch_norm: bool) -> list[int]:
    """For each number of chunks the smallest size that gives it, ascending, less those that BatchNorm can't take."""
    sizes = sorted({-(-batch_size // chunks) for chunks in range(2, batch_size + 1)})
    return [size for size in sizes if not batch_norm or (batch_size - 1) % size]


def _has_batch_norm(net: nn.Module) -> bool:
    """Whether anything normalises by the images of a chunk while the net trains."""
    return any(isinstance(module, _BatchNorm) and module.training for module in fake_copy(net).train().modules())


def _free_memory() -> int:
    if not torch.cuda.is_available():
        raise ValueError("without a CUDA device memory must be given, in bytes: memory=11 * 2**30, for example")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _lines(needed: dict[int | None, int]) -> list[str]:
    return [f"{'the whole batch' if size is None else f'chunks of {size}'}: {gib(needed[size])}" for size in needed]
