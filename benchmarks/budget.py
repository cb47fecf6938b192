"""How much time and memory the mining benchmark may take: what would take too much is left out, with the reason."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from machine import free_memory
from turns import LEAST, LONG, Turns


class Case(NamedTuple):
    """One size of batch to mine in."""

    size: int
    dim: int
    dtype: str = "float32"
    memory: bool = True  # measured too; on a CPU that takes a process for each side

    def __str__(self) -> str:
        return f"B={self.size} D={self.dim} {self.dtype}"


class Budget:
    """Foresees from smaller batches what a batch takes: time and memory grow with the square of its size at most."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.perf_counter() + seconds
        self.unit, self.longest = seconds / 60, seconds / 10  # of a point, and of a single call
        self.times: dict[tuple[str, str, int], tuple[int, float]] = {}
        self.bytes: dict[tuple[str, str], tuple[int, int]] = {}
        self.failures: dict[tuple[str, str], tuple[int, str]] = {}

    def left(self) -> float:
        return self.end - time.perf_counter()

    def longest_round(self) -> float:
        """Of a point of several rounds."""
        return min(LONG * self.unit, self.left() / (1 + LEAST))

    def refuse(self, names: Sequence[str], case: Case) -> dict[str, str]:
        """The sides that are to be left out, and why; of those that don't all fit the time that is left, the last."""
        refused, left = {}, max(0.0, self.left())
        times = 2 if case.memory and self.device.type == "cpu" else 1  # there, memory is measured in a call of its own
        for name in names:
            needs = times * self._foreseen_seconds(name, case)
            if why := self._refuse_one(name, case):
                refused[name] = why
            elif needs > left:
                refused[name] = f"skipped: would take about {needs:.0f} s, more than is left to the benchmark"
            else:
                left -= needs
        return refused

    def note_times(self, turns: Turns, case: Case) -> None:
        for name, values in turns.seconds.items():
            self.times[name, case.dtype, case.dim] = case.size, min(values)

    def note_memory(self, name: str, case: Case, grown: int, failure: str | None) -> None:
        if failure is None:
            self.bytes[name, case.dtype] = case.size, grown
        else:
            self.failures[name, case.dtype] = case.size, failure

    def _refuse_one(self, name: str, case: Case) -> str | None:
        size, failure = self.failures.get((name, case.dtype), (case.size + 1, ""))
        if case.size >= size:
            return failure
        seconds = self._foreseen_seconds(name, case)
        if seconds > self.longest:
            return f"skipped: one call would take about {seconds:.0f} s"
        # On a GPU it may be tried: there, lack of memory is an error and not an end.
        size, grown = self.bytes.get((name, case.dtype), (case.size, 0))
        needs, free = grown * max(1, case.size / size) ** 2, free_memory()
        if self.device.type == "cpu" and needs > free:
            return f"skipped: would take about {needs / 2**30:.0f} GiB, and {free / 2**30:.0f} are free"
        return None

    def _foreseen_seconds(self, name: str, case: Case) -> float:
        size, seconds = self.times.get((name, case.dtype, case.dim), (case.size, 0.0))
        return seconds * max(1, case.size / size) ** 2
