"""Where the time of mining a small batch goes, on a CPU: its steps one by one, and beside it the others.

python benchmarks/mining_stages.py > benchmarks/results/mining-stages.md
"""

import argparse
from collections.abc import Callable

import torch
from machine import origin
from miners import LIMIT, PUBLISHED, dense_torch, metric_learning, product, publish
from mining import Case, make_batch
from tables import origin_line
from torch import Tensor
from turns import ratio, spread, take_turns

from apinet_head import mine_pairs
from apinet_head.mining import Search, dense
from apinet_head.mining.products import symmetric_products
from apinet_head.mining.rows import may_stay

SEARCHES = [Search("similar", same_class=True), Search("similar", same_class=False)]


def stages(features: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """mine_pairs and its steps, each on what the step before gives; then the others."""
    products = symmetric_products(features)
    distance = torch.sub(products.diagonal().clone(), products, alpha=2)
    same = labels[:, None] == labels
    candidate = torch.stack([same, ~same])
    sample = features[:: max(1, len(features) // dense.SAMPLE)]

    def masks() -> Tensor:
        same = labels[:, None] == labels
        candidate = torch.stack([same, ~same])
        candidate.diagonal(0, 1, 2).fill_(False)
        return candidate

    return {
        LIMIT: product(features, labels),
        "mine_pairs": lambda: mine_pairs(features, labels, backend="dense"),
        "… its backend, without checks and the making of Pairs": lambda: dense.mine(
            features, labels, None, labels, 0, SEARCHES
        ),
        "… … products, most of them once": lambda: symmetric_products(features),
        "… … whether a sample, and all, are finite and not far from the origin": lambda: (
            may_stay(sample @ sample.T) and may_stay(products)
        ),
        "… … distances": lambda: torch.sub(products.diagonal().clone(), products, alpha=2),
        "… … who may be whose partner": masks,
        "… … the nearest of those": lambda: torch.where(candidate, distance, torch.inf).min(2),
        PUBLISHED: publish(features, labels),
        "dense torch": dense_torch(features, labels),
        "pytorch-metric-learning": metric_learning(features, labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=120, help="rows (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="channels (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cpu")
    turns = take_turns(stages(*make_batch(Case(args.size, args.dim, "float32"), device)), device, seconds=3)
    print(f"Mining a batch of {args.size} rows of {args.dim} channels, float32, step by step.\n")
    print(f"| | microseconds, median [quartiles] | share of {LIMIT} |\n| --- | ---: | ---: |")
    for name, seconds in turns.seconds.items():
        low, median, high = (1e6 * spread(seconds)[key] for key in ("low", "median", "high"))
        print(f"| {name} | {median:,.0f} [{low:,.0f}, {high:,.0f}] | {ratio(turns, name, LIMIT)['median']:.2f} |")
    print(f"\n{origin_line(origin(device))}")


if __name__ == "__main__":
    main()
