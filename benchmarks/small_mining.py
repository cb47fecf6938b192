"""Pair mining beside the plainest way to write it in PyTorch, on a CPU: small batches, and a batch among many keys.

    python benchmarks/small_mining.py --output benchmarks/results/small-mining.md

The plainest way is one `addmm` and two masked minima. It has no regard for features that are not finite, out of range,
far from the origin or near to each other, nor for pairs that don't exist. Sides take turns; ratios are within a round.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from machine import origin
from tables import origin_line
from torch import Tensor
from tqdm import tqdm
from turns import ratio, spread, take_turns

from apinet_head import mine_pairs

SIZES, DIMS = (8, 24, 60, 120, 480, 1920), (512, 768, 2048)
KEYS = ((480, 512), (1024, 512), (4096, 512), (8192, 512), (65536, 512), (8192, 2048))
PLAIN, OURS = "plainest dense torch", "ours"


def plainest(features: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Partners of the same class and of another; a batch searched in itself passes itself as keys."""
    distance = torch.addmm(keys.square().sum(1), features, keys.T, alpha=-2)
    same = labels[:, None] == key_labels
    other = ~same if keys is not features else ~same | torch.eye(len(labels), dtype=torch.bool)
    return distance.masked_fill(other, torch.inf).argmin(1), distance.masked_fill(same, torch.inf).argmin(1)


def of_batch(size: int, dim: int) -> dict[str, Callable[[], object]]:
    """The sides for random features, for the same with a NaN, and for tight classes, as those of trained nets are."""
    labels = torch.arange(size) // 4
    features = torch.randn(size, dim)
    broken, tight = features.clone(), torch.randn(size, dim)[labels] + 0.1 * features
    broken[size // 2, 0] = torch.nan
    return {
        PLAIN: lambda: plainest(features, labels, features, labels),
        OURS: lambda: mine_pairs(features, labels),
        "ours, a NaN": lambda: mine_pairs(broken, labels),
        "ours, tight classes": lambda: mine_pairs(tight, labels),
    }


def among_keys(size: int, dim: int) -> dict[str, Callable[[], object]]:
    """The sides for 120 queries among `size` keys."""
    features, labels = torch.randn(120, dim), torch.arange(120) // 4
    keys, key_labels = torch.randn(size, dim), torch.randint(200, (size,))
    return {
        PLAIN: lambda: plainest(features, labels, keys, key_labels),
        OURS: lambda: mine_pairs(features, labels, keys=keys, key_labels=key_labels),
    }


def row(name: str, sides: dict[str, Callable[[], object]], seconds: float) -> str:
    turns = take_turns(sides, torch.device("cpu"), seconds)
    plain = spread(turns.seconds[PLAIN])["median"]
    cells = [name, f"{1e6 * plain:,.0f}"]
    for side in list(sides)[1:]:
        taken, of_plain = spread(turns.seconds[side])["median"], ratio(turns, side, PLAIN)
        cells.append(f"{1e6 * taken:,.0f} ({of_plain['median']:.2f}x, {1e6 * (taken - plain):+,.0f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2, help="for each row of the tables (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file for the tables, in Markdown (default: the terminal)")
    options = parser.parse_args()
    torch.manual_seed(0)
    lines = ["Microseconds, medians; in brackets the median ratio to the plainest dense torch, and the difference.\n"]
    lines += [f"| | {PLAIN} | {OURS} | {OURS}, one NaN | {OURS}, tight classes |", "| --- " + "| ---: " * 4 + "|"]
    cases = [(size, dim) for dim in DIMS for size in SIZES]
    for size, dim in tqdm(cases, desc="batches"):
        lines.append(row(f"B={size}, D={dim}", of_batch(size, dim), options.seconds))
    lines += [f"\n| | {PLAIN} | {OURS} |", "| --- | ---: | ---: |"]
    for size, dim in tqdm(KEYS, desc="keys"):
        lines.append(row(f"120 queries, {size:,} keys, D={dim}", among_keys(size, dim), options.seconds))
    text = "\n".join([*lines, "", origin_line(origin(torch.device("cpu")))]) + "\n"
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
