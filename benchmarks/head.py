"""What head and loss take for one batch, forward and backward: ours, and the published way.

    python benchmarks/head.py

At the paper's batch of 30 classes x 4 images, with dropout, after a check that all sides compute the same; ours also
with some rows of logits at a time. Memory is what a step takes beyond weights and features, gradients included.
"""

from itertools import product
from typing import Any, NamedTuple

import published
import torch
from footprint import growth_of_process, memory_of, saved_bytes
from harness import DTYPES, Part, Point, evenly, main, take_turns
from torch import Tensor

from apinet_head import APIHead, APILoss, api_loss, mine_pairs

OURS, PUBLISHED = "ours", "published"
ROWS = {f"ours, rows={rows}": APILoss(rows=rows) for rows in (64, 128)}
SIDES = (PUBLISHED, OURS, *ROWS)


class Case(NamedTuple):
    classes: int
    mining: bool = True  # whether the pairs are mined in the time that is measured, or given
    dtype: str = "float32"
    batch: int = 120
    dim: int = 2048

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self._asdict().items())


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    classes = (200,) if quick else (100, 200, 1000)
    found = [Case(*one, dtype) for dtype in DTYPES[device.type] for one in product(classes, (False, True))]
    many = [Case(50_000, dim=512), *([Case(50_000), Case(200_000)] if device.type == "cuda" else [])]
    return found if quick else found + many


class Side:
    """Head and loss of one side on one batch; the weights are the same for all sides."""

    def __init__(self, name: str, case: Case, device: torch.device, dropout: float = 0.5) -> None:
        torch.manual_seed(0)
        ours: Any = APIHead(case.dim, case.classes, dropout=dropout, device=device)
        self.name, self.case, self.head = name, case, _published(ours, dropout) if name == PUBLISHED else ours
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(case.batch, case.dim, generator=generator).relu_().to(device).requires_grad_()
        self.labels = (torch.arange(case.batch) // 4 % case.classes).to(device)
        self.pairs = None if case.mining else mine_pairs(self.features, self.labels)

    def learning(self) -> list[Tensor]:
        return [self.features, *self.head.parameters()]

    def loss(self) -> Any:
        head, pairs = self.head, self.pairs
        with torch.autocast(self.features.device.type, torch.bfloat16, enabled=self.case.dtype == "bfloat16"):
            if self.name == PUBLISHED:
                return published.training_loss(head, self.features, self.labels, pairs and pairs.partner)
            if self.name in ROWS:
                return head(self.features, self.labels, pairs=pairs, criterion=ROWS[self.name]).total
            return api_loss(head(self.features, self.labels, pairs=pairs))

    def forget(self) -> None:
        for value in self.learning():
            value.grad = None

    def step(self) -> None:
        self.forget()
        self.loss().backward()


def _published(ours: Any, dropout: float) -> Any:
    head = published.Head(ours.dim, ours.num_classes, dropout=dropout).to(ours.classifier.weight.device)
    for mine, other in ((ours.mutual.fc1, head.map1), (ours.mutual.fc2, head.map2), (ours.classifier, head.fc)):
        other.load_state_dict(mine.state_dict())
    return head


def check_same(device: torch.device) -> None:
    """Raise where loss or gradients differ, without dropout, in float64: a comparison of costs would mean nothing."""
    for mining in (True, False):
        found = []
        for name in SIDES:
            side = Side(name, Case(10, mining, batch=40, dim=64), device, dropout=0.0)
            side.head.double()
            side.features = side.features.detach().double().requires_grad_()
            loss = side.loss()
            found.append([loss, *torch.autograd.grad(loss, side.learning())])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0])


def measure(case: Case, device: torch.device, seconds: float) -> Point:
    """Time of a step of all sides, the bytes that its backward pass keeps, and its memory."""
    check_same(device)
    built = {name: Side(name, case, device) for name in SIDES}
    turns = take_turns({name: side.step for name, side in built.items()}, seconds)
    result = turns.summary(PUBLISHED)
    for name in turns.seconds:
        side = built[name]
        result[name]["saved"], _ = saved_bytes(side.loss, side.learning())
        side.forget()
        result[name] |= memory_of(lambda side=side: side.step, device, grow, name, case)  # type: ignore[misc]
    return {**case._asdict(), "sides": result}


def grow(name: str, case: Case) -> int:
    Side(name, Case(10, case.mining, batch=40, dim=64), torch.device("cpu")).step()  # loads what is loaded at first use
    return growth_of_process(Side(name, case, torch.device("cpu")).step)


PART = Part(cases, evenly(measure), seconds=50)

if __name__ == "__main__":
    main(__doc__, {"head": PART})
