"""Pair mining with one [B,M] matrix of distances: the plain way, and the fastest for batches of a few thousand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining.contract import Found, Search
from apinet_head.mining.rows import exact_products, prepare


def mine(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
    generator: torch.Generator | None,
) -> list[Found]:
    """See `contract.Backend`."""
    queries, keys, finite = prepare(features, keys)
    distance = None
    if any(search.how != "random" for search in searches):
        with exact_products(features.device.type):
            # |q - k|² less |q|², which is the same for all candidates of a row.
            distance = torch.addmm(keys.square().sum(1), queries, keys.T, alpha=-2)

    candidate = finite.expand(queries.shape[0], -1)
    if key_offset is not None:
        own = torch.arange(queries.shape[0], device=labels.device)[:, None] + key_offset
        candidate = candidate & (torch.arange(keys.shape[0], device=labels.device) != own)
    same = labels[:, None] == key_labels
    return [_choose(search.how, distance, candidate & (same if search.same_class else ~same), generator)
            for search in searches]  # fmt: skip


def _choose(how: str, distance: Tensor | None, candidate: Tensor, generator: torch.Generator | None) -> Found:
    """The candidate of each row with the lowest cost; argmin takes the lowest index of equal ones."""
    if how == "random" or distance is None:
        cost = torch.rand(candidate.shape, generator=generator, device=candidate.device)
    else:
        cost = distance if how == "similar" else -distance
    return Found(cost.masked_fill(~candidate, torch.inf).argmin(1), candidate.any(1))
