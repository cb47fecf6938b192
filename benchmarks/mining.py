"""How long pair mining takes: ours, what people use today, and the one product x @ x.T that they all start with.

    python benchmarks/mining.py --output benchmarks/results

All sides run in turn, round after round, and ratios are taken within a round, so that a busy moment hits all alike.
Writes DEVICE-DATE-mining.json and a Markdown table of the same name.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from apinet_head import mine_pairs

Side = Callable[[Tensor, Tensor], Tensor | None]
LIMIT = "x @ x.T"


def published(features: Tensor, labels: Tensor) -> Tensor:
    """The published method, from its description: distances on the device, the rest in numpy on the host."""
    squares = features.square().sum(1)
    distance = (squares[:, None] - 2 * features @ features.T + squares).cpu().numpy()
    classes = labels.cpu().numpy()[:, None]
    same = classes == classes.T
    np.fill_diagonal(same, False)
    intra = np.where(same, distance, np.inf).argmin(1)
    np.fill_diagonal(same, True)
    inter = np.where(same, np.inf, distance).argmin(1)
    pairs = np.zeros((2 * len(classes), 2))
    for half, partners in enumerate((intra, inter)):
        for row, partner in enumerate(partners):
            pairs[half * len(classes) + row] = row, partner
    return torch.from_numpy(pairs).long().to(features.device)[:, 1]


def with_cdist(features: Tensor, labels: Tensor) -> Tensor:
    """torch.cdist, masks and argmin, as one writes it down first."""
    distance = torch.cdist(features, features)
    same = labels[:, None] == labels
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    intra = distance.masked_fill(~same | own, torch.inf).argmin(1)
    return torch.cat([intra, distance.masked_fill(same, torch.inf).argmin(1)])


def metric_learning() -> Side | None:
    """pytorch-metric-learning's nearest positive and nearest negative, if it is installed."""
    try:
        from pytorch_metric_learning.miners import BatchEasyHardMiner
    except ImportError:
        return None
    miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard")

    def mine(features: Tensor, labels: Tensor) -> Tensor | None:
        anchors, positives, others, negatives = miner(features, labels)
        if len(positives) != len(labels) or len(negatives) != len(labels):
            return None  # it leaves out anchors without a partner, and may order the others as it likes
        return torch.cat([positives[anchors.argsort()], negatives[others.argsort()]])

    return mine


def sides(device: torch.device) -> dict[str, Side]:
    found: dict[str, Side] = {
        LIMIT: lambda features, labels: (features @ features.T)[:0, 0],
        "ours, dense": lambda features, labels: mine_pairs(features, labels, backend="dense").partner,
        "ours, tiled": lambda features, labels: mine_pairs(features, labels, backend="tiled").partner,
        "published method": published,
        "torch.cdist": with_cdist,
    }
    if device.type == "cuda":
        found["ours, triton"] = lambda features, labels: mine_pairs(features, labels, backend="triton").partner
    learning = metric_learning()
    return found | ({"pytorch-metric-learning": learning} if learning else {})


def measure(size: int, dim: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every side in every round, and how many of its partners are those of float64."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(size, dim, generator=generator).relu().to(device)  # pooled features are not negative
    labels = (torch.arange(size) // 4).to(device)
    right = mine_pairs(features.double(), labels, backend="tiled").partner
    seconds: dict[str, list[float]] = {name: [] for name in sides(device)}
    agreement: dict[str, float | None] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, side in sides(device).items():
            _wait(device)
            start = time.perf_counter()
            partner = side(features, labels)
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            elif name != LIMIT:
                agreement[name] = None if partner is None else float((partner == right).float().mean())
    return {"size": size, "dim": dim, "seconds": seconds, "agreement": agreement}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_table(points: list[dict[str, Any]]) -> str:
    """Median milliseconds, and in brackets the median ratio to x @ x.T of the same round."""
    names = list(points[0]["seconds"])
    lines = ["| B | D | " + " | ".join(names) + " |", "| ---: | ---: |" + " ---: |" * len(names)]
    for point in points:
        cells = []
        for name in names:
            times, limit = point["seconds"][name], point["seconds"][LIMIT]
            ratio = statistics.median(a / b for a, b in zip(times, limit, strict=True))
            cells.append(f"{1000 * statistics.median(times):.2f}" + ("" if name == LIMIT else f" ({ratio:.2f})"))
        lines.append(f"| {point['size']} | {point['dim']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[120, 480, 1920, 8192], metavar="B")
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 2048], metavar="D")
    parser.add_argument("--rounds", type=int, default=5, help="of the largest size; smaller ones get more")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder for the JSON and the table")
    options = parser.parse_args()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    cases = [(size, dim) for size in options.sizes for dim in options.dims]
    points = [
        measure(size, dim, min(200, options.rounds * max(options.sizes) // size), device)
        for size, dim in tqdm(cases, desc="measuring")
    ]
    origin = {
        "date": str(date.today()), "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    table = (
        f"{make_table(points)}\n\nMilliseconds, in brackets the ratio to {LIMIT} of the same round; float32. {origin}"
    )
    print(table)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        stem = options.output / f"{name.replace(' ', '-').lower()}-{origin['date']}-mining"
        stem.with_suffix(".json").write_text(json.dumps({"origin": origin, "points": points}, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
