"""How much memory a training step takes, and which chunk size fits a GPU: estimated without that GPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from apinet_head._checks import check_int, check_module, check_number
from apinet_head._fake_step import Loss, fake_copy, peak_of_step
from apinet_head.loss import api_loss


class StepMemory(NamedTuple):
    """Bytes at the peak of a training step.

    Attributes:
        total: the sum of the others.
        parameters: parameters and buffers.
        gradients: of the parameters that learn.
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


Chunks = tuple[int | None, int]  # chunk size, None for the whole batch; and how many chunks are kept


class ChunkChoice(NamedTuple):
    """A chunk size, and how many chunks are kept; `str()` says why these.

    Attributes:
        chunk_size: for `APINet(chunk_size=...)`; None for the whole batch.
        keep_chunks: for `APINet(keep_chunks=...)`.
        batch_size: images in a step.
        needed: bytes that a step takes, for each chunk size and number of kept chunks that was estimated.
        budget: `memory` less the margin.
        memory: bytes that there are.
    """

    chunk_size: int | None
    keep_chunks: int
    batch_size: int
    needed: dict[Chunks, int]
    budget: int
    memory: int

    @property
    def recomputed(self) -> float:
        """Share of the batch that runs through the backbone a second time."""
        return _recomputed(self.batch_size, (self.chunk_size, self.keep_chunks)) / self.batch_size

    @property
    def time(self) -> float:
        """Time of a step over that of the whole batch at once, where a forward pass is a third of it."""
        return 1 + self.recomputed / 3

    def __str__(self) -> str:
        chosen = self.chunk_size, self.keep_chunks
        others = {chunks: amount for chunks, amount in self.needed.items() if chunks != chosen}
        price = f", {self.recomputed:.0%} recomputed in about {self.time:.2f} times the time of the whole batch"
        return (
            f"{_named(chosen, self.batch_size)} for a batch of {self.batch_size}{price if self.chunk_size else ''}: "
            f"{gib(self.needed[chosen])} by estimate, of {gib(self.budget)} to be used ({gib(self.memory)} less the "
            "margin)" + "".join(f"; {line}" for line in _lines(others, self.batch_size))
        )


def step_memory(
    net: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, ...],
    *,
    chunk_size: int | None = None,
    keep_chunks: int = 1,
    amp: torch.dtype | None = None,
    moments: int = 1,
    loss: Loss | None = None,
) -> StepMemory:
    """Estimate the peak of memory of a training step: forward, loss, `zero_grad()`, backward.

    The step runs on fake tensors, which have shapes but no data, under torch's `MemTracker`. Parameters, gradients and
    the optimiser's state count. Not counted: the CUDA context, workspaces of cuDNN and cuBLAS, fragmentation, DDP's
    buckets (the gradients once more), images loaded ahead, temporary copies of the optimiser.

    Args:
        net: an `APINet`, or any module together with `loss`; on any device, "meta" included. It is not changed.
        batch_size: images in a step on one device.
        image_size: S of images [3,S,S]; or the shape of an image.
        chunk_size: in place of that of the `APINet` or `ChunkedBackbone` in the net; None for the whole batch.
        keep_chunks: in place of that of the net, see `ChunkedBackbone`.
        amp: dtype of autocast, torch.bfloat16 or torch.float16; None for none.
        moments: tensors that the optimiser keeps per parameter: 1 for SGD with momentum, 2 for Adam.
        loss: a function of net, images and labels; None for `api_loss(net(images, labels))`.

    Raises:
        ValueError: a number is out of its range, the net has no chunks to set the size of, or it reads values of
            tensors, which fake ones don't have.
        TypeError: net is not a module, or a size or number is not an int.
        RuntimeError: this torch has no MemTracker.

    Examples:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(300, 100))
        >>> step_memory(net, 8, 10, moments=2, loss=lambda net, images, labels: net(images).sum())
        StepMemory(total=494468, parameters=120400, gradients=120400, optimizer=240800, activations=12868)
    """
    check_module(net, "net")
    check_int(batch_size, "batch_size", 1)
    check_int(moments, "moments", 0)
    check_int(keep_chunks, "keep_chunks", 0)
    shape = tuple(image_size) if isinstance(image_size, (tuple, list)) else (3, image_size, image_size)
    for side in shape:
        check_int(side, "image_size", 1)
    if chunk_size is not None:
        check_int(chunk_size, "chunk_size", 1)
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp must be torch.bfloat16, torch.float16 or None, got {amp!r}")
    loss = loss or (lambda net, images, labels: api_loss(net(images, labels)))
    peak, fixed, gradients = peak_of_step(net, (batch_size, *shape), chunk_size, keep_chunks, amp, loss)
    optimizer = moments * gradients
    return StepMemory(peak + optimizer, fixed, gradients, optimizer, peak - fixed - gradients)


def pick_chunk_size(
    net: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, ...],
    *,
    chunk_size: int | None = None,
    memory: int | None = None,
    margin: float = 0.15,
    amp: torch.dtype | None = None,
    moments: int = 1,
    loss: Loss | None = None,
) -> ChunkChoice:
    """The chunk size and the number of kept chunks with which a training step fits into `memory`, by `step_memory`.

    The whole batch if that fits; else those with which the fewest images are recomputed, and of them the fewest chunks.
    The choice itself is estimated; most others are extrapolated from a few estimates. So a better one may be missed for
    tiny nets, where the head is part of the peak.
    Sizes below 8 are taken only where larger ones don't fit, and none that leaves one image to a chunk where BatchNorm
    would normalise that image by itself.

    Args:
        net: see `step_memory`.
        batch_size: see `step_memory`.
        image_size: see `step_memory`.
        chunk_size: take this one, as 15 of the published training, and pick only how many to keep.
        memory: bytes for the step, parameters included; None for what is free on the current CUDA device (ask before
            the net is moved there).
        margin: share of `memory` to leave alone for what `step_memory` doesn't count. Estimates were up to 0.36 GiB too
            low on an H200 (docs/memory.md).
        amp: see `step_memory`.
        moments: see `step_memory`.
        loss: see `step_memory`.

    Raises:
        ValueError: no chunk size fits, or memory is None without a CUDA device; or as in `step_memory`.
        TypeError: memory or margin is not a number; or as in `step_memory`.
        RuntimeError: as in `step_memory`.

    Examples:
        >>> from apinet_head import APINet
        >>> net = APINet("resnet18", num_classes=10)
        >>> choice = pick_chunk_size(net, batch_size=32, image_size=64, memory=205 * 2**20)
        >>> choice.chunk_size, choice.keep_chunks
        (8, 2)
    """
    if not 0 <= check_number(margin, "margin") < 1:
        raise ValueError(f"margin must be a share in [0, 1), got {margin}")
    memory = _free_memory() if memory is None else memory
    budget = int(check_number(memory, "memory", 0) * (1 - margin))
    needed: dict[Chunks, int] = {}

    def need(chunks: Chunks) -> int:
        if chunks not in needed:
            size, keep = chunks
            options: Any = {"chunk_size": size, "keep_chunks": keep, "amp": amp, "moments": moments, "loss": loss}
            needed[chunks] = step_memory(net, batch_size, image_size, **options).total
        return needed[chunks]

    if need((None, 1)) <= budget and chunk_size is None:
        return ChunkChoice(None, 1, batch_size, needed, budget, memory)
    batch_norm = any(isinstance(m, _BatchNorm) and m.training for m in fake_copy(net).train().modules())
    sizes = _sizes(batch_size, batch_norm) if chunk_size is None else [chunk_size]
    for group in ([size for size in sizes if size >= 8], [size for size in sizes if size < 8]):
        if group and need((group[0], 1)) <= budget:
            chosen = _least_recomputed(batch_size, group, budget, needed, need)
            return ChunkChoice(*chosen, batch_size, needed, budget, memory)
    raise ValueError(
        f"no chunk size brings a batch of {batch_size} into {gib(budget)} ({gib(memory)} less the margin): "
        f"{', '.join(_lines(needed, batch_size))}. Take mixed precision (amp), or a smaller net, batch or image_size"
    )


def gib(amount: int) -> str:
    """Bytes for people: "7.87 GiB", and in MiB what is below 0.1 GiB."""
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 / 10 else f"{amount / 2**20:.2f} MiB"


def _sizes(batch_size: int, batch_norm: bool) -> list[int]:
    """For each number of chunks the smallest size that gives it, ascending, less those that BatchNorm can't take."""
    sizes = sorted({-(-batch_size // chunks) for chunks in range(2, batch_size + 1)})
    return [size for size in sizes if not batch_norm or (batch_size - 1) % size]


def _least_recomputed(
    batch_size: int, sizes: list[int], budget: int, needed: dict[Chunks, int], need: Callable[[Chunks], int]
) -> Chunks:
    """Of all that fits what recomputes the fewest images in the fewest chunks; chunks of sizes[0], one kept, do fit.

    Memory is linear in the images whose activations are there at once, and in those that are computed just now. So from
    a few estimates all others are foreseen, and only what is likely to be chosen is estimated.
    """
    least = sizes[0]

    def count(size: int) -> int:
        return -(-batch_size // size)

    def foresee(chunks: tuple[int, int]) -> float:
        size, keep = chunks
        last = batch_size - (count(size) - 1) * size
        kept = batch_size - _recomputed(batch_size, chunks)
        # In the backward pass of the last chunk; of the one before, which is larger; of a recomputed one.
        moments = [(kept, last), (kept - last, size if keep > 1 else 0), (size, size if keep < count(size) else 0)]
        return fixed + max(alive * per_alive + now * per_now for alive, now in moments if now)

    most = min(3 if batch_size % least else 2, count(least))  # a smaller last chunk would mislead
    per_alive = (need((least, most)) - need((least, most - 1))) / least
    per_image = (need((None, 1)) - need((least, 1))) / max(1, batch_size - least)
    per_now, fixed, excess = per_image - per_alive, need((least, 1)) - per_image * least, 0.0
    possible = [(size, keep + 1) for size in sizes for keep in range(count(size))]
    for chunks in sorted(possible, key=lambda one: (_recomputed(batch_size, one), -one[0])):
        if chunks in needed or foresee(chunks) + excess <= budget:
            if need(chunks) <= budget:
                break
            excess = max(excess, need(chunks) - foresee(chunks))
    return chunks


def _recomputed(batch_size: int, chunks: Chunks) -> int:
    """Images of a batch that run through the backbone a second time."""
    size, keep = chunks
    return 0 if size is None else max(0, -(-batch_size // size) - keep) * size if keep else batch_size


def _free_memory() -> int:
    if not torch.cuda.is_available():
        raise ValueError("without a CUDA device memory must be given, in bytes: memory=11 * 2**30, for example")
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _named(chunks: Chunks, batch_size: int) -> str:
    size, keep = chunks
    if size is None:
        return "the whole batch"
    count, uneven = -(-batch_size // size), batch_size % size
    kept = f"{'all' if keep >= count else keep or 'none'} kept"
    return f"{count} {'chunks' if count > 1 else 'chunk'} of {'up to ' if uneven else ''}{size} ({kept})"


def _lines(needed: dict[Chunks, int], batch_size: int) -> list[str]:
    return [f"{_named(chunks, batch_size)}: {gib(amount)}" for chunks, amount in needed.items()]
