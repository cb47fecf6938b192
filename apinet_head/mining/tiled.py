"""Pair mining tile by tile: no [B,M] matrix, and for a batch searched in itself half the products.

|q - k|² is symmetric: a tile of distances above the diagonal holds the candidates of its rows, and of its columns. Each
tile is used for both and forgotten, so memory beyond the features is a few tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining.contract import Found, Search
from apinet_head.mining.dense import cost_of
from apinet_head.mining.products import exact_products, symmetric_products
from apinet_head.mining.rows import may_look, prepare


def mine(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
    *,
    tile: int | None = None,
) -> Found:
    """See `contract.Backend`; `tile` is the side of a tile."""
    if tile is None:  # on a CPU, what stays in its caches; elsewhere, what takes few launches
        tile = 512 if features.device.type == "cpu" else 4096
    symmetric = keys is None
    queries, rows, finite = prepare(features, keys)
    squares = _squares(rows, tile)
    query_squares = squares if symmetric else _squares(queries, tile)
    best = _Best(len(searches), queries)
    # Tiles come so that each row meets its candidates in ascending order: first, as a column, those before its own
    # tile, then the others. So the first of equal distances is that of the lowest index.
    for top in range(0, queries.shape[0], tile):
        for left in range(top if symmetric else 0, rows.shape[0], tile):
            down, across = slice(top, top + tile), slice(left, left + tile)
            with exact_products(features.device.type):
                if symmetric and left == top:
                    distance = torch.sub(squares[across], symmetric_products(rows[across]), alpha=2)
                else:
                    distance = torch.addmm(squares[across], queries[down], rows[across].T, alpha=-2)
            distance.add_(query_squares[down, None])
            same = labels[down, None] == key_labels[across]
            candidate = torch.stack([same if search.same_class else ~same for search in searches])
            if key_offset is not None and -same.shape[0] < top + key_offset - left < same.shape[1]:
                candidate.diagonal(top + key_offset - left, 1, 2).fill_(False)  # a row and itself
            cost = cost_of(searches, distance)
            offer = torch.where(candidate if finite is None else candidate & finite[across], cost, torch.inf)
            best.take(down, offer, 2, left)
            if symmetric and left > top:
                if finite is not None:
                    offer = torch.where(candidate & finite[down, None], cost, torch.inf)
                best.take(across, offer, 1, top)
    return Found(best.partner, best.cost < torch.inf)


def _squares(rows: Tensor, tile: int) -> Tensor:
    """|row|² of each, a tile at a time: all numbers squared at once would be a second copy of the features."""
    return torch.cat([part.square().sum(1) for part in torch.split(rows, tile)])


class _Best:
    """The best partners so far of all queries, for S searches."""

    def __init__(self, searches: int, queries: Tensor) -> None:
        shape, device = (searches, queries.shape[0]), queries.device
        self.cost = torch.full(shape, torch.inf, dtype=queries.dtype, device=device)
        self.partner = torch.zeros(shape, dtype=torch.int64, device=device)
        self.may_look = may_look(queries)

    def take(self, queries: slice, cost: Tensor, dim: int, first: int) -> None:
        """Let the queries choose along `dim` of their costs [S,rows,columns], where the keys from `first` on are."""
        if self.may_look:
            self._take_few(queries, cost.movedim(dim, 2), first)
            return
        lowest, partner = cost.min(dim)
        better = lowest < self.cost[:, queries]
        self.cost[:, queries] = torch.where(better, lowest, self.cost[:, queries])
        self.partner[:, queries] = torch.where(better, partner + first, self.partner[:, queries])

    def _take_few(self, queries: slice, cost: Tensor, first: int) -> None:
        """`take` on a CPU, which finds minima ten times as fast as where they are: asked only where one is better."""
        lowest = cost.amin(2)
        better = lowest < self.cost[:, queries]
        self.cost[:, queries][better] = lowest[better]
        self.partner[:, queries][better] = cost[better].argmin(1) + first
