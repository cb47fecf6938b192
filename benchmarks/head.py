"""What head and loss take for one batch, forward and backward: ours, and the published way.

    python benchmarks/head.py

At the paper's batch of 30 classes x 4 images and 2048 channels, in train mode with dropout. First it is checked that
both compute the same. On CUDA also under bfloat16 autocast, as in most training.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import published
import torch
from footprint import peak_on_device, saved_bytes
from machine import default_device
from tables import head_table
from torch import Tensor
from tqdm import tqdm
from turns import summarise, take_turns

from apinet_head import APIHead, Pairs, api_loss, mine_pairs

OURS, PUBLISHED = "ours", "published"


class Case(NamedTuple):
    classes: int
    mining: bool  # whether the pairs are mined in the time that is measured, or given
    dtype: str = "float32"
    batch: int = 120
    dim: int = 2048

    def __str__(self) -> str:
        return f"C={self.classes} {self.dtype}, pairs {'mined' if self.mining else 'given'}"


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    classes = (200,) if quick else (100, 200, 1000)
    return [Case(number, mining, dtype) for dtype in dtypes for number in classes for mining in (False, True)]


def points(cases: Sequence[Case], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """A point for each case, all of them in about so many seconds."""
    check_same(device)
    for case in cases:
        yield _measure(case, device, seconds / len(cases))


def make_heads(dim: int, classes: int, dropout: float, **factory: Any) -> tuple[APIHead, published.Head]:
    """Ours and the published one, of the same weights."""
    ours, theirs = APIHead(dim, classes, dropout=dropout), published.Head(dim, classes, dropout=dropout)
    for mine, other in ((ours.mutual.fc1, theirs.map1), (ours.mutual.fc2, theirs.map2), (ours.classifier, theirs.fc)):
        other.load_state_dict(mine.state_dict())  # type: ignore[union-attr]
    return ours.to(**factory), theirs.to(**factory)


def our_loss(head: APIHead, features: Tensor, labels: Tensor, pairs: Pairs | None) -> Tensor:
    return api_loss(head(features, labels, pairs=pairs))


def their_loss(head: published.Head, features: Tensor, labels: Tensor, pairs: Pairs | None) -> Tensor:
    return published.training_loss(head, features, labels, None if pairs is None else pairs.partner)


def check_same(device: torch.device, batch: int = 40, dim: int = 64, classes: int = 10) -> None:
    """Without dropout and with the same weights, loss and all gradients are equal, in float64.

    Raises:
        AssertionError: they are not, and a comparison of their times would mean nothing.
    """
    torch.manual_seed(0)
    heads = make_heads(dim, classes, 0.0, device=device, dtype=torch.float64)
    features, labels = make_batch(batch, dim, classes, device)
    for pairs in (None, mine_pairs(features, labels)):
        found = []
        for head, loss_of in zip(heads, (our_loss, their_loss), strict=True):
            x = features.double().requires_grad_()
            loss = loss_of(head, x, labels, pairs)  # type: ignore[operator]
            found.append([loss, *torch.autograd.grad(loss, [x, *head.parameters()])])
        torch.testing.assert_close(*found)


def make_batch(batch: int, dim: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, generator=generator).relu_().to(device)
    return features, (torch.arange(batch) // 4 % classes).to(device)


def _measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    heads = dict(zip((OURS, PUBLISHED), make_heads(case.dim, case.classes, 0.5, device=device), strict=True))
    features, labels = make_batch(case.batch, case.dim, case.classes, device)
    features.requires_grad_()
    pairs = None if case.mining else mine_pairs(features, labels)
    losses, calls = {}, {}
    for name, head in heads.items():
        losses[name] = _loss_of(name, head, features, labels, pairs, case.dtype)
        calls[name] = _there_and_back(losses[name], [features, *head.parameters()])
    turns = take_turns(calls, device, seconds)
    result = summarise(turns, PUBLISHED)
    for name in turns.seconds:
        saved, loss = saved_bytes(losses[name], [features, *heads[name].parameters()])
        loss.backward()
        result[name]["saved"] = saved
        if device.type == "cuda":
            result[name]["memory"] = peak_on_device(calls[name], device)
    return {**case._asdict(), "sides": result}


def _loss_of(name: str, head: Any, features: Tensor, labels: Tensor, pairs: Pairs | None, dtype: str) -> Any:
    loss_of: Any = our_loss if name == OURS else their_loss

    def call() -> Tensor:
        with torch.autocast(features.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return loss_of(head, features, labels, pairs)

    return call


def _there_and_back(loss_of: Any, learning: list[Tensor]) -> Any:
    def call() -> None:
        for value in learning:
            value.grad = None
        loss_of().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--seconds", type=float, default=30, help="for all of it (default: %(default)s)")
    options = parser.parse_args()
    chosen = cases(options.device)
    print(head_table(list(tqdm(points(chosen, options.device, options.seconds), total=len(chosen), desc="head"))))


if __name__ == "__main__":
    main()
