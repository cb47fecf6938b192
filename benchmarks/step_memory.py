"""Time and memory of a training step: the whole batch, gradient checkpointing, and chunks.

    python benchmarks/step_memory.py --only chunks --output benchmarks/results

"chunks": a step by how many chunks are kept, beside GradCache's way (and sentence-transformers' cached losses'),
written from its description; memory beyond parameters and the optimiser's state, beside the estimate of `step_memory`.
"estimated": larger batches, not run. "choices": what `pick_chunk_size` picks.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from footprint import growth_of_process, memory_of
from harness import Part, Point, evenly, main, take_turns
from report import CHECKPOINTING, WHOLE
from torch import Tensor
from train_step import CLASSES, OURS, Case, Step, autocast, make_backbone, make_batch, make_losses

from apinet_head import APINet, ChunkedBackbone
from apinet_head.step_memory import StepMemory, pick_chunk_size, step_memory

CACHED, CPU = "cache all, run all again", torch.device("cpu")
AMPS = {"float32": None, "bfloat16": torch.bfloat16}
BATCHES, CHUNKS, GPUS = (30, 60, 120, 240, 480), (30, 15, 8, 4), (8, 11, 16, 24, 40, 80)
BASES: dict[str, dict[str, Any]] = {WHOLE: {}, CHECKPOINTING: {"checkpointing": True}}  # what `estimate` is told


def kept(case: Case) -> dict[str, int]:
    """For each way in chunks how many are kept."""
    chunks = -(-case.batch // case.chunk)
    return {"none kept": 0, "one kept": 1, "half kept": chunks // 2, "all but one kept": chunks - 1, "all kept": chunks}


class CachedStep(Step):
    """All features without gradients, the gradient of the loss for them, then every chunk once more with that."""

    def __init__(self, chunk: int, *parts: Any) -> None:
        super().__init__(*parts)
        self.chunk = chunk

    def backward(self, images: Tensor, labels: Tensor) -> None:
        chunks = images.split(self.chunk)
        with torch.no_grad():
            features = torch.cat([self.features(*one) for one in enumerate(chunks)]).requires_grad_()
        with autocast(images):
            loss = self.loss_of(self.head, features, labels)
        loss.backward()
        gradient: Any = features.grad
        for seed, (chunk, part) in enumerate(zip(chunks, gradient.split(self.chunk), strict=True)):
            self.features(seed, chunk).backward(part)

    def features(self, seed: int, chunk: Tensor) -> Any:
        torch.manual_seed(seed)  # dropout is to be the same both times
        with autocast(chunk):
            return self.run(chunk)


def make_step(way: str, case: Case, device: torch.device) -> Step:
    backbone = make_backbone(case.backbone, device)
    backbone.set_grad_checkpointing(way == CHECKPOINTING)
    run = ChunkedBackbone(backbone, case.chunk, keep=kept(case)[way]) if way in kept(case) else backbone
    one = make_losses(backbone.num_features, device)[OURS]
    return CachedStep(case.chunk, run, *one) if way == CACHED else Step(run, *one)


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [Case("resnet18", 32, 8, "float32", 2)]
    if device.type == "cpu":  # the last is so small that the host's work counts, as beside a fast GPU
        sizes = {"resnet50": 160, "convnext_tiny": 160, "mobilenetv2_035": 32}
        return [Case(name, pixels, 32, "float32", 8) for name, pixels in sizes.items()]
    sizes = {"resnet50": 224, "convnext_tiny": 224, "vit_base_patch16_224": 224, "resnet101": 448}
    return [Case(name, pixels, 120, "bfloat16", 15) for name, pixels in sizes.items()]


def measure(case: Case, device: torch.device, seconds: float) -> Point:
    """Time and memory of each way, measured and estimated; of those that failed the reason."""
    batch = make_batch(case.batch, case.pixels, device)
    calls = {way: partial(make_step(way, case, device), *batch) for way in (*BASES, *kept(case), CACHED)}
    turns = take_turns(calls, seconds)
    sides = turns.summary(WHOLE)
    for way in turns.seconds:
        if "all kept" in turns.seconds:
            sides[way]["over all kept"] = turns.ratio(way, "all kept")
        sides[way] |= memory_of(lambda way=way: calls[way], device, grow, way, case)  # type: ignore[misc]
    chunked = {way: {"chunk_size": case.chunk, "keep_chunks": keep} for way, keep in kept(case).items()}
    for way, how in (BASES | chunked).items():
        found = estimate(case, **how)
        sides[way]["estimate"] = found.gradients + found.activations - batch[0].nbytes
    return {**case._asdict(), "sides": sides}


def grow(way: str, case: Case) -> int:
    """Bytes by which this process grows in a step; one of a tiny batch has made what stays."""
    step = make_step(way, case, CPU)
    step(*make_batch(8, 32, CPU))
    batch = make_batch(case.batch, case.pixels, CPU)
    return growth_of_process(lambda: step(*batch))


def estimate(case: Case, checkpointing: bool = False, **chunks: Any) -> StepMemory:
    net = _net(case)
    net.backbone.set_grad_checkpointing(checkpointing)
    return step_memory(net, case.batch, case.pixels, amp=AMPS[case.dtype], **chunks)


def _net(case: Case) -> Any:
    with torch.device("meta"):
        return APINet(case.backbone, CLASSES)


def estimate_ways(case: Case, device: torch.device, seconds: float) -> Point:
    ways = BASES | {f"chunks of {chunk}": {"chunk_size": chunk} for chunk in CHUNKS if chunk < case.batch}
    return {**case._asdict(), "sides": {way: {"memory": estimate(case, **how).total} for way, how in ways.items()}}


def choose(case: Case, device: torch.device, seconds: float) -> Point:
    """Chunk size, if none is given, and number of kept chunks for GPUs of so many GiB."""
    sides: dict[str, Any] = {}
    for gpu in GPUS:
        options: Any = {"amp": AMPS[case.dtype], "memory": gpu * 2**30, "chunk_size": case.chunk or None}
        try:
            found = pick_chunk_size(_net(case), case.batch, case.pixels, **options)
            chosen = f"{found.chunk_size}, {found.keep_chunks} kept" if found.chunk_size else WHOLE
            needed = found.needed[found.chunk_size, found.keep_chunks]
            sides[f"{gpu} GB"] = {"chosen": chosen, "memory": needed, "time": found.time}
        except ValueError:  # it does not fit
            sides[f"{gpu} GB"] = {"absent": "out of memory"}
    return {**case._asdict(), "sides": sides}


def large(batches: Sequence[int], chunks: Sequence[int] = (0,)) -> Any:
    found = [Case("resnet101", 448, *one) for one in product(batches, AMPS, chunks)]
    return lambda device, quick: found[: 1 if quick else None]


PARTS = {
    "chunks": Part(cases, evenly(measure), seconds=36),
    "estimated": Part(large(BATCHES), evenly(estimate_ways)),
    "choices": Part(large((120,), (0, 15)), evenly(choose)),
}

if __name__ == "__main__":
    main(__doc__, PARTS, ending="-chunks")
