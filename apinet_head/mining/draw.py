"""Random partners without a [B,M] matrix: candidates are ranked, and the one of a random rank is chosen."""

import torch
from torch import Tensor

from apinet_head.mining.query import Query


def draw(query: Query, usable: Tensor, same_class: bool, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A candidate of each query [B], drawn uniformly, and whether it has any [B].

    Args:
        query: its `searches` are ignored.
        usable: [M], which keys may be partners at all.
        same_class: whether candidates are of the query's class, or of all others.
        generator: None for torch's default generator.
    """
    labels, key_labels, key_offset = query.labels, query.key_labels, query.key_offset
    size, device = labels.shape[0], labels.device
    classes, order = key_labels.sort(stable=True)
    # ranks[p]: number of usable keys before position p of the order. A class is a range of ranks.
    ranks = torch.nn.functional.pad(usable[order].cumsum(0), (1, 0))
    first = ranks[torch.searchsorted(classes, labels)]
    last = ranks[torch.searchsorted(classes, labels, right=True)]
    # Not rand(size), which the compiler rejects for a symbolic size with generator=None.
    uniform = torch.empty(size, device=device, dtype=torch.float64).uniform_(generator=generator)
    if same_class:
        own, itself = _ranks_of_queries(ranks, usable, order, size, key_offset)
        count = last - first - itself.long()
        rank = first + (uniform * count).long()
        rank = rank + (itself & (rank >= own))
    else:
        count = ranks[-1] - (last - first)
        rank = (uniform * count).long()
        rank = rank + (last - first).where(rank >= first, 0)
    # The key of a rank is where the cumulative count first exceeds it.
    place = torch.searchsorted(ranks[1:].contiguous(), rank, right=True)
    return order[place.clamp(max=order.shape[0] - 1)], (count > 0) & (labels >= 0)


def _ranks_of_queries(
    ranks: Tensor, usable: Tensor, order: Tensor, size: int, key_offset: int | None
) -> tuple[Tensor, Tensor]:
    """The rank of each query among the keys [B], and whether it is a usable key [B]."""
    if key_offset is None:
        return order.new_zeros(size), usable.new_zeros(size)
    queries = slice(key_offset, key_offset + size)
    return ranks[order.argsort()[queries]], usable[queries]
