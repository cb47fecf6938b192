"""Where the time of mining a small batch goes, on a CPU: its steps one by one, and beside it the others.

python benchmarks/mining_stages.py > benchmarks/results/mining-stages.md
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from machine import origin
from miners import LIMIT, PUBLISHED, dense_torch, metric_learning, product, publish
from mining import Case, make_batch
from tables import origin_line
from torch import Tensor
from turns import ratio, spread, take_turns

from apinet_head import mine_pairs
from apinet_head.mining import BACKENDS, Query, Search
from apinet_head.mining.rows import as_they_are, is_worth_halving, symmetric_products

SEARCHES = (Search("similar", same_class=True), Search("similar", same_class=False))


def stages(features: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """mine_pairs and its steps, each on what the step before gives; then the others."""
    query = Query(features, labels, None, labels, 0, SEARCHES)
    squares = features.square().sum(1)

    def products() -> Tensor:
        return symmetric_products(features) if is_worth_halving(features) else features @ features.T

    def distances(products: Tensor) -> Tensor:
        return torch.sub(squares, products, alpha=2).add_(squares[:, None])

    def mask() -> Tensor:
        same = labels[:, None] == labels
        candidate = torch.stack([same, ~same])
        candidate.diagonal(0, 1, 2).fill_(False)
        return candidate

    product_matrix, candidate = products(), mask()
    distance = distances(product_matrix)
    return {
        LIMIT: product(features, labels),
        "mine_pairs": lambda: mine_pairs(features, labels, backend="dense"),
        "… its backend, without the checks and without making Pairs": lambda: BACKENDS["dense"](query),
        "… … squares, from the products if these are halved, and a look at them": lambda: as_they_are(query, None),
        "… … … products": products,
        "… … distances": lambda: distances(product_matrix),
        "… … candidate mask": mask,
        "… … the nearest candidates": lambda: torch.where(candidate, distance, torch.inf).min(2),
        PUBLISHED: publish(features, labels),
        "dense torch": dense_torch(features, labels),
        "pytorch-metric-learning": metric_learning(features, labels),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=120, help="rows (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=2048, help="channels (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="for all of it (default: %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cpu")
    turns = take_turns(stages(*make_batch(Case(args.size, args.dim), device)), device, args.seconds)
    print(f"Mining a batch of {args.size} rows of {args.dim} channels, float32, step by step.\n")
    print(f"| | microseconds, median [quartiles] | share of {LIMIT} |\n| --- | ---: | ---: |")
    for name, seconds in turns.seconds.items():
        low, median, high = (1e6 * spread(seconds)[key] for key in ("low", "median", "high"))
        print(f"| {name} | {median:,.0f} [{low:,.0f}, {high:,.0f}] | {ratio(turns, name, LIMIT)['median']:.2f} |")
    print(f"\n{origin_line(origin(device))}")


if __name__ == "__main__":
    main()
