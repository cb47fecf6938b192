"""What head and loss take with many classes, forward and backward: all logits at once, and some rows at a time.

    python benchmarks/many_classes.py

At a batch of 30 classes x 4 images, in train mode with dropout: 960 rows of logits. The sides are `api_loss(head(...))`
and `head(..., criterion=APILoss(rows=...))`, which first are checked to compute the same. Memory is what a step takes
beyond weights and features, so with all gradients: on CUDA by PyTorch's account, on a CPU by the growth of a fresh
process. "limit" is the larger of the logits' size and 1.1 of the weight's.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from footprint import can_measure_growth, growth_of_process, in_fresh_process, peak_on_device
from head import make_batch
from machine import default_device, origin
from tables import origin_line
from torch import Tensor
from tqdm import tqdm
from turns import summarise, take_turns

from apinet_head import APIHead, APILoss, api_loss

CASES = ((50_000, 512), (50_000, 2048), (200_000, 2048))  # classes and channels
AT_ONCE = "at once"
CRITERIA = {AT_ONCE: None, **{f"rows={rows}": APILoss(rows=rows) for rows in (64, 128)}}
LOGITS = 8 * 120  # rows: two images of each of 240 pairs, under two gates


def step_of(side: str, classes: int, dim: int, device: torch.device) -> Callable[[], Tensor]:
    """A step of one side, gradients set anew; it returns the loss."""
    return _step(_make_head(classes, dim, device), CRITERIA[side], *make_batch(120, dim, classes, device))


def measure(classes: int, dim: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds, and bytes at most, of all sides."""
    head, batch = _make_head(classes, dim, device), make_batch(120, dim, classes, device)
    turns = take_turns({side: _step(head, criterion, *batch) for side, criterion in CRITERIA.items()}, device, seconds)
    found = summarise(turns, AT_ONCE)
    del head
    for side in CRITERIA:
        if device.type == "cuda":
            found[side]["memory"] = peak_on_device(step_of(side, classes, dim, device), device)
        elif can_measure_growth():
            found[side]["memory"], found[side]["absent"] = in_fresh_process(growth, side, classes, dim, seconds=600)
    return found


def growth(side: str, classes: int, dim: int) -> int:
    return growth_of_process(step_of(side, classes, dim, torch.device("cpu")))


def check_same(device: torch.device, classes: int = 300, dim: int = 32) -> None:
    """Without dropout, loss and all gradients of the sides are equal, in float64.

    Raises:
        AssertionError: they are not, and a comparison of their costs would mean nothing.
    """
    features, labels = make_batch(40, dim, classes, device)
    head = _make_head(classes, dim, device, dropout=0.0).double()
    found = []
    for criterion in CRITERIA.values():
        x = features.double()
        loss = _step(head, criterion, x, labels)()
        found.append([loss.detach(), x.grad, *(parameter.grad for parameter in head.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


def _make_head(classes: int, dim: int, device: torch.device, dropout: float = 0.5) -> APIHead:
    torch.manual_seed(0)
    return APIHead(dim, classes, dropout=dropout, device=device)


def _step(head: APIHead, criterion: APILoss | None, features: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    features.requires_grad_()

    def step() -> Tensor:
        for tensor in (features, *head.parameters()):
            tensor.grad = None
        loss = (
            api_loss(head(features, labels)) if criterion is None else head(features, labels, criterion=criterion).total
        )
        loss.backward()
        return loss

    return step


def table(points: list[tuple[int, int, dict[str, Any]]]) -> str:
    """A row for each side of each case, in Markdown."""
    lines = ["| C | D | logits | s | ratio | MiB | limit MiB |", "|--:|--:|---|--:|--:|--:|--:|"]
    for classes, dim, sides in points:
        limit = max(LOGITS * classes, 1.1 * classes * dim) * 4 / 2**20
        for side, found in sides.items():
            memory = f"{found['memory'] / 2**20:,.0f}" if found.get("memory") else found.get("absent") or "-"
            times = (
                f"{found['seconds']['median']:.3g} | {found['ratio']['median']:.2f}" if "ratio" in found else "- | -"
            )
            lines.append(f"| {classes:,} | {dim} | {side} | {times} | {memory} | {limit:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--seconds", type=float, default=30, help="for each number of classes (default: %(default)s)")
    parser.add_argument("--classes", type=int, help="this case alone; with --dim")
    parser.add_argument("--dim", type=int, default=2048, help="of the case of --classes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the table, in Markdown (default: the terminal)")
    options = parser.parse_args()
    check_same(options.device)
    cases = CASES if options.classes is None else ((options.classes, options.dim),)
    points = [(*case, measure(*case, options.device, options.seconds)) for case in tqdm(cases, desc="many classes")]
    text = f"{table(points)}\n\n{origin_line(origin(options.device))}\n"
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
