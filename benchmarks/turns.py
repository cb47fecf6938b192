"""Sides that take turns, round after round, so that a busy moment of the machine hits all of them alike."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from machine import wait

LEAST, MOST = 3, 200  # rounds
LONG = 4  # times as long as a whole point should take: so long a round is not repeated


class Turns(NamedTuple):
    """Seconds of every side in each round, and of the sides that have none, the reason."""

    seconds: dict[str, list[float]]
    absent: dict[str, str]
    warm: bool


def take_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, alone: float | None = None
) -> Turns:
    """Call all sides in turn, in about so many seconds; a side that fails in the first round stays out of the others.

    The first round warms up, and at least three more are measured. But a first round of more seconds than `alone`
    (by default four times `seconds`) is measured itself, and is the only one.
    """
    taken: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    for name, call in calls.items():
        try:
            taken[name] = [_time(call, device)]
        except Exception as error:  # whatever a side dies of, it is what there is to say about it
            absent[name] = reason(error)
    round_takes = sum(first for (first,) in taken.values())
    if not taken or round_takes > (LONG * seconds if alone is None else alone):
        return Turns(taken, absent, warm=False)
    rounds = min(MOST, max(LEAST, int(seconds / round_takes)))
    names, order = list(taken), random.Random(0)
    taken = {name: [] for name in names}
    for _ in range(rounds):
        order.shuffle(names)  # what a side leaves in caches and allocators may help or harm the one that follows
        for name in names:
            taken[name].append(_time(calls[name], device))
    return Turns(taken, absent, warm=True)


def summarise(turns: Turns, base: str) -> dict[str, dict[str, Any]]:
    """Of each side median and quartiles of its seconds, and of its ratio to the side `base` in the same round."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in turns.seconds.items():
        found[name] = {"seconds": spread(values), "rounds": len(values), "warm": turns.warm}
        if base in turns.seconds:
            found[name]["ratio"] = ratio(turns, name, base)
    return found | {name: {"absent": why} for name, why in turns.absent.items()}


def ratio(turns: Turns, side: str, base: str) -> dict[str, float]:
    """Median and quartiles of the ratio of two sides' times in the same round."""
    return spread([a / b for a, b in zip(turns.seconds[side], turns.seconds[base], strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, to five digits."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    return {name: float(f"{value:.5g}") for name, value in (("low", low), ("median", median), ("high", high))}


def reason(error: Exception) -> str:
    """Why a side has no figure, in a line."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    if isinstance(error, MemoryError):
        return text or "out of memory"
    return f"not available: {text[:300]}" if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"


def release(device: torch.device) -> None:
    """Give back memory that nothing uses any more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _time(call: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start
