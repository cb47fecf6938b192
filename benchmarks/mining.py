"""What pair mining takes: ours, what people use today, and the one product x @ x.T that they all start with.

    python benchmarks/mining.py --sizes 120 1920 --dims 2048

Prints tables; `run.py` writes all benchmarks into a file. The sides take turns, and ratios are taken within a round.
The batches hold four images of each class, in random order.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from budget import Budget, Case
from footprint import can_measure_growth, count_syncs, growth_of_process, in_fresh_process, peak_on_device
from machine import default_device
from miners import AUTO, LIMIT, Mine, Side, sides
from tables import mining_tables
from torch import Tensor
from tqdm import tqdm
from turns import ratio, reason, release, summarise, take_turns

SIZES = {"cpu": (120, 480, 1920, 8192, 16384), "cuda": (120, 480, 1920, 8192, 32768, 65536, 131072)}
DIMS = (2048, 768, 512)
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
TINY = 32  # rows of a batch that warms up; torch.cdist takes up to 25 in another way
ASKED = 256  # rows whose partners are compared with those in float64


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    sizes, dims = ((120, 480, 1920), (2048, 512)) if quick else (SIZES[device.type], DIMS)
    return cases_of(sizes, dims, DTYPES[device.type], device)


def cases_of(sizes: Sequence[int], dims: Sequence[int], dtypes: Sequence[str], device: torch.device) -> list[Case]:
    """Small ones first, for from them is foreseen what large ones take."""
    return [
        Case(size, dim, dtype, memory=device.type == "cuda" or dim == max(dims))
        for dtype in dtypes
        for size in sorted(sizes)
        for dim in sorted(dims, reverse=True)
    ]


def points(cases: Sequence[Case], device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """A point for each case, all of them in about so many seconds."""
    found, budget = sides(device), Budget(device, seconds)
    for case in cases:
        absent = budget.refuse(list(found), case)
        beside = _memory_on_host(case, found, absent, budget) if device.type == "cpu" and case.memory else {}
        yield _measure(case, found, absent, beside, device, budget)


def _measure(
    case: Case,
    found: dict[str, Side],
    absent: dict[str, str],
    beside: dict[str, dict[str, Any]],
    device: torch.device,
    budget: Budget,
) -> dict[str, Any]:
    """Times of all sides that are not absent yet, and what is known of them beside."""
    result: dict[str, dict[str, Any]] = {}
    if len(absent) < len(found):
        features, labels = make_batch(case, device)
        calls, partners = {}, {}
        for name, side in found.items():
            if name in absent:
                continue
            try:
                if device.type == "cuda":
                    beside[name] = _cost_on_device(side, case, features, labels)
                calls[name] = _keeping(partners, name, side(features, labels))
            except Exception as error:  # whatever a side dies of, it is what there is to say about it
                absent[name] = reason(error)
        turns = take_turns(calls, device, budget.unit, alone=budget.longest_round())
        budget.note_times(turns, case)
        result = summarise(turns, LIMIT)
        for name in turns.seconds:
            if AUTO in turns.seconds:
                result[name]["ours / this"] = ratio(turns, AUTO, name)
        for name, share in agreement(partners, features, labels).items():
            result[name]["agreement"] = share
    release(device)
    result |= {name: {"absent": why} for name, why in absent.items()}
    return {
        "size": case.size, "dim": case.dim, "dtype": case.dtype, "least": least(case),
        "sides": {name: result[name] | beside.get(name, {}) for name in found},
    }  # fmt: skip


def _keeping(partners: dict[str, Tensor | None], name: str, mine: Mine) -> Callable[[], None]:
    """A call that leaves its partners there."""

    def call() -> None:
        partners[name] = mine()

    return call


def agreement(partners: Mapping[str, Tensor | None], features: Tensor, labels: Tensor) -> dict[str, float]:
    """Of each side the share of partners that are those of float64, of as many rows as are asked."""
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:ASKED].to(labels.device)
    right = right_partners(features, labels, rows)
    return {
        name: float((partner.view(2, -1)[:, rows] == right).double().mean())
        for name, partner in partners.items()
        if partner is not None
    }


def make_batch(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(case.size, case.dim, generator=generator, device=device)
    labels = torch.randperm(case.size, generator=generator, device=device) // 4
    return features.relu_().to(getattr(torch, case.dtype)), labels  # pooled features are not negative


def right_partners(features: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """Of some rows the partners [2,R] of the same class and of another, by brute force in float64."""
    x = features.double()
    x -= x.mean(0)
    distance = x.square().sum(1) - 2 * x[rows] @ x.T
    same = labels[rows, None] == labels
    others = distance.masked_fill(same, torch.inf)
    distance[torch.arange(len(rows), device=rows.device), rows] = torch.inf
    return torch.stack([distance.masked_fill_(~same, torch.inf).argmin(1), others.argmin(1)])


def least(case: Case) -> dict[str, int]:
    """What mining cannot do without: each two rows multiplied once; all rows read, all partners written."""
    itemsize = getattr(torch, case.dtype).itemsize
    return {
        "flops": case.size * (case.size - 1) * case.dim,
        "bytes": case.size * case.dim * itemsize + 2 * case.size * torch.int64.itemsize,
    }


def _memory_on_host(
    case: Case, found: dict[str, Side], absent: dict[str, str], budget: Budget
) -> dict[str, dict[str, Any]]:
    """The growth of a process of each side; sides that fail there go to the absent ones."""
    beside: dict[str, dict[str, Any]] = {}
    if not can_measure_growth():
        return beside
    for name in found:
        if name not in absent:
            grown, failure = in_fresh_process(grow, name, case, seconds=2 * budget.longest)
            budget.note_memory(name, case, grown, failure)
            if failure is None:
                beside[name] = {"memory": grown}
            else:
                absent[name] = failure
    return beside


def grow(name: str, case: Case) -> int:
    """Bytes by which this process grows when a side mines for the first time, but for a tiny batch that warms up."""
    device = torch.device("cpu")
    side = sides(device)[name]
    side(*make_batch(case._replace(size=TINY), device))()
    batch = make_batch(case, device)
    return growth_of_process(lambda: side(*batch)())


def _cost_on_device(side: Side, case: Case, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Peak of memory and number of waits, on CUDA; a tiny batch has warmed up."""
    device = features.device
    side(*make_batch(case._replace(size=TINY), device))()
    memory = peak_on_device(lambda: side(features, labels)(), device)
    return {"memory": memory, "syncs": count_syncs(side(features, labels))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="B")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="D")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="float32, bfloat16, ...")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--seconds", type=float, default=300, help="for all of it (default: %(default)s)")
    options = parser.parse_args()
    kind = options.device.type
    chosen = cases_of(options.sizes or SIZES[kind], options.dims, options.dtypes or DTYPES[kind], options.device)
    bar = tqdm(points(chosen, options.device, options.seconds), total=len(chosen), desc="mining")
    print(mining_tables(list(bar)))


if __name__ == "__main__":
    main()
