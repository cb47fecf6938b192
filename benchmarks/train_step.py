"""What API-Net adds to a training step: cross-entropy alone, with the published head and mining, with ours.

    python benchmarks/train_step.py

A step is forward, backward and SGD, on random images and from random weights, with one and the same backbone under
three heads. On CUDA the paper's batch of 120 in bfloat16 autocast, in chunks if need be; on a CPU a batch of 32 at
128 x 128 pixels in float32, where a head weighs more than in earnest.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import published
import timm
import torch
import torch.nn.functional as F
from machine import default_device
from tables import step_table
from torch import Tensor, nn
from tqdm import tqdm
from turns import release, summarise, take_turns

from apinet_head import APIHead, ChunkedBackbone, api_loss

PLAIN, PUBLISHED, OURS = "cross-entropy alone", "published", "ours"
CLASSES = 200  # as in CUB-200-2011


class Case(NamedTuple):
    backbone: str
    pixels: int
    batch: int

    def __str__(self) -> str:
        return f"{self.backbone} {self.batch} x {self.pixels}²"


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    if quick:
        return [Case("resnet18", 64, 16)]
    if device.type == "cpu":
        return [Case("resnet50", 128, 32), Case("convnext_tiny", 128, 32)]
    large = [Case(name, 448, 120) for name in ("resnet101", "resnet50", "convnext_tiny")]
    return [*large, Case("vit_base_patch16_224", 224, 120)]


def points(cases: Sequence[Case], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """A point for each case, all of them in about so many seconds."""
    for case in cases:
        yield _measure(case, device, seconds / len(cases))
        release(device)


def _measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    # pretrained=False: weights change no time, and need no download.
    backbone = timm.create_model(case.backbone, pretrained=False, num_classes=0).to(device)
    losses = make_losses(int(backbone.num_features), device)
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=device)
    labels = (torch.arange(case.batch, device=device) // 4) % CLASSES
    for chunk in _chunks(case.batch) if device.type == "cuda" else [case.batch]:
        calls = {name: make_step(backbone, chunk, *one, images, labels) for name, one in losses.items()}
        if chunk == min(_chunks(case.batch)) or device.type == "cpu" or _fits(calls, device):
            break
    result = summarise(take_turns(calls, device, seconds), PLAIN)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return {**case._asdict(), "chunk": chunk, "dtype": dtype, "classes": CLASSES, "sides": result}


def make_losses(dim: int, device: torch.device) -> dict[str, tuple[nn.Module, Callable[[Any, Tensor, Tensor], Tensor]]]:
    """For each side its head, and how the head, features and labels make a loss."""
    return {
        PLAIN: (
            nn.Linear(dim, CLASSES, device=device),
            lambda head, features, labels: F.cross_entropy(head(features), labels),
        ),
        PUBLISHED: (published.Head(dim, CLASSES).to(device), published.training_loss),
        OURS: (
            APIHead(dim, CLASSES, device=device),
            lambda head, features, labels: api_loss(head(features, labels)),
        ),
    }


def make_step(
    backbone: nn.Module,
    chunk: int,
    head: nn.Module,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
) -> Callable[[], None]:
    """A training step. The backbone is shared between the sides, so the step is too short to move it anywhere."""
    run = backbone if chunk == len(images) else ChunkedBackbone(backbone, chunk)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=1e-6, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
            loss = loss_of(head, run(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _chunks(batch: int) -> list[int]:
    return [batch // parts for parts in (1, 2, 4, 8, 15) if batch // parts]


def _fits(calls: dict[str, Callable[[], None]], device: torch.device) -> bool:
    """Whether the memory of the device is enough for a step of each side."""
    try:
        for call in calls.values():
            call()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        release(device)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--seconds", type=float, default=90, help="for all of it (default: %(default)s)")
    options = parser.parse_args()
    chosen = cases(options.device)
    print(step_table(list(tqdm(points(chosen, options.device, options.seconds), total=len(chosen), desc="steps"))))


if __name__ == "__main__":
    main()
