"""Pair mining tile by tile: no [B,M] matrix, and for a batch searched in itself half the products.

|q - k|² is symmetric: a tile of distances above the diagonal holds the candidates of its rows, and of its columns. Each
tile is used for both and forgotten, so memory beyond the features is a few tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining.contract import Found, Search
from apinet_head.mining.rows import exact_products, prepare

TILE = 1024


def mine(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
    generator: torch.Generator | None,
    *,
    tile: int = TILE,
) -> Found:
    """See `contract.Backend`; `tile` is the side of a tile."""
    symmetric = keys is None
    queries, keys, finite = prepare(features, keys)
    best = [_Best(search, queries, generator) for search in searches]
    query_squares = queries.square().sum(1, keepdim=True)
    key_squares = query_squares.T if symmetric else keys.square().sum(1)[None]
    # Tiles come so that each row meets its candidates in ascending order: first, as a column, those before its own
    # tile, then the others. So the first of equal distances is that of the lowest index.
    with exact_products(features.device.type):
        for top in range(0, queries.shape[0], tile):
            rows = slice(top, min(top + tile, queries.shape[0]))
            for left in range(top if symmetric else 0, keys.shape[0], tile):
                columns = slice(left, min(left + tile, keys.shape[0]))
                distance = torch.addmm(key_squares[:, columns], queries[rows], keys[columns].T, alpha=-2)
                distance.add_(query_squares[rows])
                same = labels[rows, None] == key_labels[columns]
                own = None if key_offset is None else _own(rows, columns, key_offset, labels.device)
                for one in best:
                    one.offer(distance, same, own, finite[columns], rows, left)
                    if symmetric and left > top:
                        one.offer(distance.T, same.T, None, finite[rows], columns, top)
    cost, partner = (torch.stack([getattr(one, name) for one in best]) for name in ("cost", "partner"))
    return Found(partner, cost < torch.inf)


class _Best:
    """The best partner so far of every query, for one search."""

    def __init__(self, search: Search, queries: Tensor, generator: torch.Generator | None) -> None:
        self.search, self.generator = search, generator
        size, device = queries.shape[0], queries.device
        self.cost = torch.full((size,), torch.inf, dtype=queries.dtype, device=device)
        self.partner = torch.zeros(size, dtype=torch.int64, device=device)

    def offer(
        self, distance: Tensor, same: Tensor, own: Tensor | None, finite: Tensor, rows: slice, first: int
    ) -> None:
        """Let the queries `rows` choose among the keys from `first` on, given their distances [rows, keys]."""
        candidate = (same if self.search.same_class else ~same) & finite
        if own is not None:
            candidate = candidate & ~own
        cost = distance
        if self.search.how == "dissimilar":
            cost = -distance
        elif self.search.how == "random":
            cost = torch.rand(distance.shape, generator=self.generator, device=distance.device, dtype=distance.dtype)
        cost, partner = cost.masked_fill(~candidate, torch.inf).min(1)
        better = cost < self.cost[rows]
        self.cost[rows] = torch.where(better, cost, self.cost[rows])
        self.partner[rows] = torch.where(better, partner + first, self.partner[rows])


def _own(rows: slice, columns: slice, offset: int, device: torch.device) -> Tensor:
    """[rows, columns] bool: where a query meets itself."""
    query = torch.arange(rows.start, rows.stop, device=device) + offset
    return query[:, None] == torch.arange(columns.start, columns.stop, device=device)
