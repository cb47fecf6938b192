"""What API-Net adds to a training step: cross-entropy alone, with the published head and mining, with ours.

    python benchmarks/train_step.py

A step is forward, backward and SGD, of the same backbone under three heads, from random weights. On CUDA the paper's
batch of 120 in bfloat16 autocast, in chunks if need be; on a CPU 32 small images, where a head weighs more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import published
import timm
import torch
import torch.nn.functional as F
from harness import Part, Point, evenly, main, take_turns
from torch import Tensor, nn

from apinet_head import APIHead, APINet, ChunkedBackbone, api_loss
from apinet_head.step_memory import pick_chunk_size

PLAIN, PUBLISHED, OURS = "cross-entropy alone", "published", "ours"
CLASSES = 200  # as in CUB-200-2011
LossOf = Callable[[Any, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    backbone: str
    pixels: int
    batch: int
    dtype: str = "float32"
    chunk: int = 0  # 0 for the whole batch at once

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self._asdict().items())


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick or device.type == "cpu":
        return [Case("resnet18", 64, 16)] if quick else [Case("resnet50", 128, 32), Case("convnext_tiny", 128, 32)]
    sizes = {"resnet101": 448, "resnet50": 448, "convnext_tiny": 448, "vit_base_patch16_224": 224}
    return [Case(name, pixels, 120, "bfloat16") for name, pixels in sizes.items()]


def measure(case: Case, device: torch.device, seconds: float) -> Point:
    choice = None
    if device.type == "cuda":
        choice = pick_chunk_size(APINet(case.backbone, CLASSES), case.batch, case.pixels, amp=torch.bfloat16)
    backbone = run = make_backbone(case.backbone, device)
    if choice and choice.chunk_size:
        case = case._replace(chunk=choice.chunk_size)
        run = ChunkedBackbone(backbone, choice.chunk_size, keep=choice.keep_chunks)
    batch = make_batch(case.batch, case.pixels, device)
    steps = {name: Step(run, *one) for name, one in make_losses(backbone.num_features, device).items()}
    sides = take_turns({name: partial(step, *batch) for name, step in steps.items()}, seconds).summary(PLAIN)
    return {**case._asdict(), "sides": sides}


def make_backbone(name: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0).to(device)  # weights change no time


def make_batch(size: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    labels = torch.arange(size, device=device) // 4 % CLASSES
    return torch.randn(size, 3, pixels, pixels, device=device), labels


def make_losses(dim: int, device: torch.device) -> dict[str, tuple[nn.Module, LossOf]]:
    """For each side its head, and how the head, features and labels make a loss."""
    return {
        PLAIN: (nn.Linear(dim, CLASSES, device=device), lambda head, x, labels: F.cross_entropy(head(x), labels)),
        PUBLISHED: (published.Head(dim, CLASSES).to(device), published.training_loss),
        OURS: (APIHead(dim, CLASSES, device=device), lambda head, x, labels: api_loss(head(x, labels))),
    }


class Step:
    """A training step. The sides share the backbone, so a step is too short to move it anywhere."""

    def __init__(self, run: nn.Module, head: nn.Module, loss_of: LossOf) -> None:
        self.run, self.head, self.loss_of = run, head, loss_of
        parameters = [*run.parameters(), *head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.backward(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()  # last: beyond what is there before, memory holds the gradients

    def backward(self, images: Tensor, labels: Tensor) -> None:
        with autocast(images):
            loss = self.loss_of(self.head, self.run(images), labels)
        loss.backward()


def autocast(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda)


PART = Part(cases, evenly(measure), seconds=90)

if __name__ == "__main__":
    main(__doc__, {"train_step": PART})
