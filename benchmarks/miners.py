"""The ways to mine pairs that mining.py compares.

Each takes features [B,D] and labels [B], prepares what it needs, and gives a call that returns the partners [2B]: of
all rows the nearest of the same class, then of all the nearest of another class.
"""

from collections.abc import Callable

import published
import torch
from machine import free_memory
from torch import Tensor

from apinet_head import mine_pairs
from apinet_head.mining import BACKENDS

Mine = Callable[[], Tensor | None]
Side = Callable[[Tensor, Tensor], Mine]
LIMIT, AUTO, GRAPH, PUBLISHED = "x @ x.T", "ours, auto", "ours, CUDA graph", "published method"
GRAPH_UP_TO = 2048  # rows: what one would put into a graph is a training step, and launches are what a graph saves


def sides(device: torch.device) -> dict[str, Side]:
    """All of them by name: the product that they all start with, ours, others."""
    found: dict[str, Side] = {LIMIT: product, AUTO: ours("auto")}
    found |= {f"ours, {name}": ours(name) for name in BACKENDS}
    if device.type == "cuda":
        found[GRAPH] = graph
    return found | {
        PUBLISHED: publish,
        "dense torch": dense_torch,
        "torch.cdist": cdist,
        "pytorch-metric-learning": metric_learning,
    }


def product(features: Tensor, labels: Tensor) -> Mine:
    def call() -> None:
        features @ features.T

    return call


def ours(backend: str) -> Side:
    return lambda features, labels: lambda: mine_pairs(features, labels, backend=backend).partner


def graph(features: Tensor, labels: Tensor) -> Mine:
    """Ours, recorded once and replayed."""
    if len(features) > GRAPH_UP_TO:
        raise ValueError(f"measured for batches of up to {GRAPH_UP_TO} rows only")
    stream = torch.cuda.Stream(features.device)
    stream.wait_stream(torch.cuda.current_stream(features.device))
    with torch.cuda.stream(stream):  # what is compiled or allocated on first use must not fall into the recording
        mine_pairs(features, labels)
    torch.cuda.current_stream(features.device).wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        partner = mine_pairs(features, labels).partner

    def call() -> Tensor:
        recorded.replay()
        return partner

    return call


def publish(features: Tensor, labels: Tensor) -> Mine:
    # A matrix of distances, its masked copy, and the mask. The host may not survive the lack of memory, so it is asked.
    needs, free = 9 * len(features) ** 2, free_memory()
    if needs > free:
        raise MemoryError(
            f"out of memory: needs about {needs / 2**30:.0f} GiB of the host, {free / 2**30:.0f} are free"
        )
    return lambda: published.mine(features, labels)


def dense_torch(features: Tensor, labels: Tensor) -> Mine:
    """Distances by the product, masks, argmin, as one writes it down first."""

    def call() -> Tensor:
        squares = features.square().sum(1)
        return _nearest(squares[:, None] - 2 * features @ features.T + squares, labels)

    return call


def cdist(features: Tensor, labels: Tensor) -> Mine:
    return lambda: _nearest(torch.cdist(features, features), labels)


def _nearest(distance: Tensor, labels: Tensor) -> Tensor:
    same = labels[:, None] == labels
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    intra = distance.masked_fill(~same | own, torch.inf).argmin(1)
    return torch.cat([intra, distance.masked_fill(same, torch.inf).argmin(1)])


def metric_learning(features: Tensor, labels: Tensor) -> Mine:
    """pytorch-metric-learning's easiest positive and hardest negative, of features as they are, not normalised."""
    try:
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.miners import BatchEasyHardMiner
    except ImportError:
        raise ValueError("pytorch-metric-learning is not installed") from None
    miner = BatchEasyHardMiner(
        pos_strategy="easy", neg_strategy="hard", distance=LpDistance(normalize_embeddings=False)
    )

    def call() -> Tensor | None:
        _, positives, _, negatives = miner(features, labels)
        # It leaves out rows without a partner; here all have one, and come in order.
        return torch.cat([positives, negatives]) if len(positives) == len(negatives) == len(labels) else None

    return call
