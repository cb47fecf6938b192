"""The ways to mine pairs that mining.py compares.

Each takes a batch, prepares what it needs, and gives a call that returns the partners [2B]: of all rows the nearest of
the same class, then of all the nearest of another class.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import published
import torch
from report import AUTO, GRAPH, LIMIT, PUBLISHED
from torch import Tensor

from apinet_head import mine_pairs
from apinet_head.mining import BACKENDS

GRAPH_UP_TO = 2048  # rows: what one would put into a graph is a training step, and launches are what a graph saves


class Batch(NamedTuple):
    """Features [B,D] and labels [B]; keys [M,D], where partners are searched, are the features or others."""

    features: Tensor
    labels: Tensor
    keys: Tensor
    key_labels: Tensor

    @property
    def has_keys(self) -> bool:
        return self.keys is not self.features


Mine = Callable[[], Tensor | None]
Side = Callable[[Batch], Mine]


def sides(device: torch.device) -> dict[str, Side]:
    """All of them by name: the product that they all start with, ours, others."""
    found: dict[str, Side] = {LIMIT: product, AUTO: partial(ours, "auto")}
    found |= {f"ours, {name}": partial(ours, name) for name in BACKENDS}
    if device.type == "cuda":
        found[GRAPH] = graph
    others = {"dense torch": dense_torch, "torch.cdist": cdist, "pytorch-metric-learning": metric_learning}
    return {**found, PUBLISHED: publish, **others}


def product(batch: Batch) -> Mine:
    def call() -> None:
        batch.features @ batch.keys.T

    return call


def ours(backend: str, batch: Batch) -> Mine:
    keys: Any = {"keys": batch.keys, "key_labels": batch.key_labels} if batch.has_keys else {}
    return lambda: mine_pairs(batch.features, batch.labels, backend=backend, **keys).partner


def graph(batch: Batch) -> Mine:
    """Ours, recorded once and replayed."""
    if len(batch.keys) > GRAPH_UP_TO:
        raise ValueError(f"measured for batches of up to {GRAPH_UP_TO} rows only")
    mine, device = ours("auto", batch), batch.features.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is compiled or allocated on first use must not fall into the recording
        mine()
    torch.cuda.current_stream(device).wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        partner = mine()

    def call() -> Tensor | None:
        recorded.replay()
        return partner

    return call


def publish(batch: Batch) -> Mine:
    if batch.has_keys:
        raise ValueError("it has no keys")
    return lambda: published.mine(batch.features.float(), batch.labels)  # numpy has no bfloat16


def dense_torch(batch: Batch) -> Mine:
    """Distances by one product, masks, argmin: the plainest way, with no regard for what features may be like."""
    keys = batch.keys
    return lambda: _nearest(torch.addmm(keys.square().sum(1), batch.features, keys.T, alpha=-2), batch)


def cdist(batch: Batch) -> Mine:
    return lambda: _nearest(torch.cdist(batch.features, batch.keys), batch)


def _nearest(distance: Tensor, batch: Batch) -> Tensor:
    same = batch.labels[:, None] == batch.key_labels
    other = ~same if batch.has_keys else ~same | torch.eye(len(same), dtype=torch.bool, device=same.device)
    return torch.cat([distance.masked_fill(mask, torch.inf).argmin(1) for mask in (other, same)])


def metric_learning(batch: Batch) -> Mine:
    """pytorch-metric-learning's easiest positive and hardest negative, of features as they are, not normalised."""
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.miners import BatchEasyHardMiner

    distance = LpDistance(normalize_embeddings=False)
    miner = BatchEasyHardMiner(pos_strategy="easy", neg_strategy="hard", distance=distance)
    rows = batch if batch.has_keys else batch[:2]
    # It leaves out rows without a partner; here all have one, and come in order.
    return lambda: torch.cat(miner(*rows)[1::2])
