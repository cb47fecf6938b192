"""What pair mining takes: ours, what people use today, and the one product x @ x.T that they all start with.

    python benchmarks/mining.py --seconds 30 --only size=120

The batches hold four images of each class, in random order; some search keys in place of themselves.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from footprint import growth_of_process, memory_of
from harness import DTYPES, LEAST, LONG, Part, Point, free_memory, main, reason, take_turns
from miners import Batch, sides
from report import AUTO, LIMIT, PUBLISHED
from torch import Tensor

SIZES = {"cpu": (8, 24, 60, 120, 480, 1920, 8192, 16384), "cuda": (8, 120, 480, 1920, 8192, 32768, 65536, 131072)}
DIMS, KEYS = (2048, 768, 512), ((480, 512), (1024, 512), (8192, 512), (65536, 512), (8192, 2048))
TINY = 32  # rows of a batch that warms up; torch.cdist takes up to 25 in another way
ASKED = 256  # rows whose partners are compared with those in float64
DENSE = 40  # bytes for each product that those who keep all distances need at most


class Case(NamedTuple):
    """A batch to mine in."""

    size: int
    dim: int
    dtype: str = "float32"
    keys: int = 0  # rows to search in place of the batch

    @property
    def products(self) -> int:
        return self.size * (self.keys or self.size)

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self._asdict().items())


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """Small ones first, for from them is foreseen what large ones take; so the dtypes of a size come together."""
    sizes, dims = ((120, 480, 1920), (2048, 512)) if quick else (SIZES[device.type], DIMS)
    found = [Case(size, dim, dtype) for size in sizes for dtype in DTYPES[device.type] for dim in dims]
    found += [Case(120, dim, keys=keys) for keys, dim in (KEYS[:1] if quick else KEYS)]
    return sorted(found, key=lambda case: case.products)


class Budget:
    """Foresees from smaller batches what a batch takes: time grows with the number of products at most."""

    def __init__(self, seconds: float, cases: int) -> None:
        self.end = time.perf_counter() + seconds
        self.share, self.tenth = seconds / (2 * cases), seconds / 10  # of a case, and of a side in it at most
        self.times: dict[tuple[str, str, int], tuple[int, float]] = {}

    def refuse(self, names: Sequence[str], case: Case, device: torch.device) -> dict[str, str]:
        """The sides that are to be left out, and why; of those that don't all fit the time that is left, the last."""
        refused, left = {}, self.end - time.perf_counter()
        self.longest_round = min(LONG * self.share, left / (1 + LEAST))
        known = {name: self.times.get((name, case.dtype, case.dim), (case.products, 0.0)) for name in names}
        seconds = {name: took * max(1, case.products / products) for name, (products, took) in known.items()}
        calls = 2 if sum(seconds.values()) > self.longest_round else 2 + LEAST  # one of them measures memory
        for name in names:
            needed = calls * seconds[name]
            # A GPU raises an error where memory ends, but a host ends processes.
            if (device.type == "cpu" or name == PUBLISHED) and DENSE * case.products > free_memory():
                refused[name] = "skipped: might take more memory than is free"
            elif needed > max(0, min(left, self.tenth)):
                refused[name] = f"skipped: would take {'over a tenth of the' if needed > self.tenth else 'more'} time"
            else:
                left -= needed
        return refused


def measure(device: torch.device, budget: Budget, case: Case) -> Point:
    """Times of all sides that are not left out, and what they cost beside."""
    found = sides(device)
    absent = budget.refuse(list(found), case, device)
    batch, calls, costs = make_batch(case, device), {}, {}
    for name in [name for name in found if name not in absent]:
        try:
            if device.type == "cuda" or (case.dim, case.keys) == (DIMS[0], 0):
                if device.type == "cuda":
                    found[name](make_batch(case._replace(size=TINY, keys=0), device))()  # warms up
                prepare = partial(found[name], batch)
                costs[name] = memory_of(prepare, device, grow, name, case, seconds=2 * budget.tenth)
            if why := costs.get(name, {}).pop("memory absent", None):
                absent[name] = why
            else:
                calls[name] = found[name](batch)
        except Exception as error:  # whatever a side dies of, it is what there is to say about it
            absent[name] = reason(error)
    turns = take_turns(calls, budget.share, alone=budget.longest_round)
    result = turns.summary(LIMIT) | {name: {"absent": why} for name, why in absent.items()}
    for name, values in turns.seconds.items():
        budget.times[name, case.dtype, case.dim] = case.products, min(values)
        result[name] |= costs.get(name, {})
        if AUTO in turns.seconds:
            result[name]["ours / this"] = turns.ratio(AUTO, name)
    for name, share in agreement(turns.results, batch).items():
        result[name]["agreement"] = share
    return {**case._asdict(), "sides": {name: result[name] for name in found}}


def agreement(partners: Mapping[str, Tensor | None], batch: Batch) -> dict[str, float]:
    """Of each side the share of partners that are those of float64, of as many rows as are asked."""
    rows = torch.randperm(len(batch.labels), generator=torch.Generator().manual_seed(1))[:ASKED].to(batch.labels.device)
    right = right_partners(batch, rows)
    return {
        name: float((partner.view(2, -1)[:, rows] == right).double().mean())
        for name, partner in partners.items()
        if partner is not None and len(partner) == 2 * len(batch.labels)
    }


def right_partners(batch: Batch, rows: Tensor) -> Tensor:
    """Of some rows the partners [2,R] of the same class and of another, by brute force in float64."""
    keys = batch.keys.double()
    center = keys.mean(0)
    keys, queries = keys - center, batch.features[rows].double() - center
    distance = keys.square().sum(1) - 2 * queries @ keys.T
    same = batch.labels[rows, None] == batch.key_labels
    others = distance.masked_fill(same, torch.inf)
    if not batch.has_keys:
        distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return torch.stack([distance.masked_fill_(~same, torch.inf).argmin(1), others.argmin(1)])


def make_batch(case: Case, device: torch.device) -> Batch:
    generator = torch.Generator(device).manual_seed(0)

    def rows(size: int) -> tuple[Tensor, Tensor]:
        features = torch.randn(size, case.dim, generator=generator, device=device)
        labels = torch.randperm(size, generator=generator, device=device) // 4
        return features.relu_().to(getattr(torch, case.dtype)), labels  # pooled features are not negative

    features, labels = rows(case.size)
    return Batch(features, labels, *(rows(case.keys) if case.keys else (features, labels)))


def grow(name: str, case: Case) -> int:
    """Bytes by which this process grows when a side mines for the first time, but for a tiny batch that warms up."""
    side, device = sides(torch.device("cpu"))[name], torch.device("cpu")
    side(make_batch(case._replace(size=TINY), device))()
    batch = make_batch(case, device)
    return growth_of_process(lambda: side(batch)())


PART = Part(cases, lambda device, seconds, cases: partial(measure, device, Budget(seconds, len(cases))), seconds=300)

if __name__ == "__main__":
    main(__doc__, {"mining": PART})
