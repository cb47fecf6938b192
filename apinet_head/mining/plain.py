"""Pair mining in plain PyTorch, tile by tile; a small batch is a single tile.

    d_ij   = |q_i|² + |k_j|² - 2 q_i·k_j
    best_i = min_j (±d_ij, j)       over the candidates j of query i: + for the nearest, - for the farthest

Distances are symmetric: in a batch searched in itself, a tile above the diagonal serves both its rows and its columns,
which halves the products. Extra memory is a few tiles. Candidates whose distances are equal to within rounding are
compared again, by subtraction (`exact.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apinet_head.mining.exact import CANCELLED, CLOSEST, best_of, settle, slack
from apinet_head.mining.query import Found, Query, flip, is_eager_cpu, is_exporting
from apinet_head.mining.rows import (
    Rows,
    about_the_bulk,
    as_they_are,
    is_worth_halving,
    no_autocast,
    no_reduced_precision,
    subtract_products,
    symmetric_products,
)

SMALL = 2**27  # multiplications: 256 rows of 2048
CROWD = 16  # from so many candidates per query within rounding on, products in float64 are faster


def mine_dense(query: Query) -> Found:
    """Search with one [B,M] matrix of distances."""
    return _mine(query, None)


def mine_tiled(query: Query, *, tile: int | None = None) -> Found:
    """Search in tiles of side `tile`; None for one that fits a CPU's caches, or needs few launches elsewhere."""
    tile = tile or (512 if query.features.device.type == "cpu" else 4096)
    return _mine(query, None if max(query.shape()) <= tile else tile)


def _mine(query: Query, tile: int | None) -> Found:
    device_type = query.features.device.type
    with no_autocast(device_type), no_reduced_precision(device_type):
        if is_eager_cpu(query.features):
            return _mine_eager_cpu(query, tile)
        rows = about_the_bulk(query, tile, torch.float64 if is_small(query) else None)
        return _search((_Best if rows.dtype == torch.float64 else _Closest)(query, rows, tile), tile)


def _mine_eager_cpu(query: Query, tile: int | None) -> Found:
    """`_mine` where values can be read: most batches need no preparation, and some need float64."""
    rows = as_they_are(query, tile)
    if rows is not None:
        found = _search(near := _Near(query, rows, tile), tile)
        if not near.crowded:
            return found
    return _search(_Best(query, about_the_bulk(query, tile, torch.float64), tile), tile)


def is_small(query: Query) -> bool:
    """Whether products in float64, slow on most GPUs, are faster than comparing candidates again after float32."""
    if is_exporting():  # the program may run on batches of any size
        return False
    (count, size), dim = query.shape(), query.rows().shape[1]
    return query.features.device.type != "mps" and count * size * dim <= SMALL


def _search(best: "_Best", tile: int | None) -> Found:
    """Compute all distances tile by tile, and keep the best partners."""
    query, rows = best.query, best.rows
    symmetric, usable = query.keys is None, rows.usable
    # In this order of tiles each query sees its candidates in ascending order (as a column those before its own tile,
    # then as a row the others), so that of equal distances the one of the lowest index comes first.
    for down in _parts(query.features, tile):
        queries = rows.queries(down)
        for across in _parts(query.rows(), tile, down.start if symmetric else 0):
            if best.crowded:
                break
            mirrored = symmetric and across.start > down.start
            if symmetric and not mirrored and is_worth_halving(queries):
                products = symmetric_products(queries) if rows.products is None else rows.products
                distance = torch.sub(rows.squares[across], products, alpha=2)
            else:
                distance = subtract_products(rows.squares[across], queries, rows.keys(across))
            distance.add_(rows.query_squares[down, None])
            if rows.odd:  # a non-finite query still gets a partner
                distance.nan_to_num_(0.0, 0.0, 0.0)
            cost = flip(query.searches, distance.expand(len(query.searches), -1, -1))
            candidate = _candidates(query, down, across)
            best.take(down, _masked(cost, candidate, None if usable is None else usable[across]), across.start)
            if mirrored:
                offer = _masked(cost, candidate, None if usable is None else usable[down, None])
                best.take(across, offer.transpose(1, 2), down.start)
    found = best.found()
    return Found(found.partner, found.valid & (query.labels >= 0)) if rows.unlabelled else found


def _parts(rows: Tensor, tile: int | None, start: int = 0) -> list[slice]:
    if tile is None:
        return [slice(0, rows.shape[0])]
    return [slice(first, min(first + tile, rows.shape[0])) for first in range(start, rows.shape[0], tile)]


def _candidates(query: Query, down: slice, across: slice) -> Tensor:
    """Candidate mask [S,rows,columns]: keys of the class that the search asks for, without the query itself."""
    same = query.labels[down, None] == query.key_labels[across]
    candidate = torch.stack([same if search.same_class else ~same for search in query.searches])
    if query.key_offset is not None:
        itself = down.start + query.key_offset - across.start
        if -same.shape[0] < itself < same.shape[1]:
            candidate.diagonal(itself, 1, 2).fill_(False)
    return candidate


def _masked(cost: Tensor, candidate: Tensor, usable: Tensor | None) -> Tensor:
    return torch.where(candidate if usable is None else candidate & usable, cost, torch.inf)


class _Best:
    """The best partner so far of each query in each search, [S,B].

    Attributes:
        crowded: whether the search is given up, as too many candidates are within rounding.
    """

    crowded = False

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        self.query, self.rows, self.tile = query, rows, tile
        if tile is None:  # `take` is called only once
            return
        shape, device = (len(query.searches), query.features.shape[0]), query.features.device
        self.cost = torch.full(shape, torch.inf, dtype=rows.dtype, device=device)
        self.partner = torch.zeros(shape, dtype=torch.int64, device=device)

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        """Update the queries from their costs [S,rows,columns] for the keys from `first` on.

        Returns:
            The lowest of these costs [S,rows].
        """
        if self.tile is None:
            self.cost, self.partner = cost.min(2)
            return self.cost
        if is_eager_cpu(cost):
            return self._take_few(queries, cost, first)
        lowest, partner = cost.min(2)
        better = lowest < self.cost[:, queries]
        self.cost[:, queries] = lowest.where(better, self.cost[:, queries])
        self.partner[:, queries] = (partner + first).where(better, self.partner[:, queries])
        return lowest

    def _take_few(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        """`take` on a CPU, where amin is ten times as fast as argmin, which is computed only for improved rows."""
        lowest = cost.amin(2)
        better = lowest < self.cost[:, queries]
        self.cost[:, queries][better] = lowest[better]
        self.partner[:, queries][better] = cost[better].argmin(1) + first
        return lowest

    def found(self) -> Found:
        return Found(self.partner, self.cost < torch.inf)


class _Near(_Best):
    """As `_Best`, with all candidates that rounding may hide behind the best; subtraction decides among those."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        self.near: list[tuple[Tensor, ...]] = []

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        lowest = super().take(queries, cost, first)
        squares = self.rows.query_squares[queries]
        # A later tile may have a better candidate: collect with a safety factor.
        cancelled = CANCELLED if self.tile is None else CANCELLED / 2
        if (flip(self.query.searches, lowest) * cancelled < squares).any():
            margin = slack(self.query, self.cost[:, queries], squares, cancelled)
            bound = self.cost[:, queries] + margin
            search, row = ((lowest <= bound) & (margin > 0)).nonzero(as_tuple=True)
            costs = cost[search, row]
            which, column = (costs <= bound[search, row, None]).nonzero(as_tuple=True)
            self.crowded |= which.numel() > CROWD * margin.numel()
            if self.tile is not None or which.numel() > search.numel():
                self.near.append((search[which], row[which] + queries.start, column + first, costs[which, column]))
        return lowest

    def found(self) -> Found:
        if self.near and not self.crowded:
            search, row, key, cost = (torch.cat(parts) for parts in zip(*self.near, strict=True))
            bound = self.cost + slack(self.query, self.cost, self.rows.query_squares)
            near = cost <= bound[search, row]
            rivals = torch.zeros_like(self.partner).index_put_((search, row), near.long(), accumulate=True)
            near &= rivals[search, row] > 1
            settle(self.query, self.partner, search[near], row[near], key[near])
        return super().found()


class _Closest(_Best):
    """The few best candidates of each query, a fixed number, so that nothing synchronises."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        self.closest: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        costs, keys = _closest(cost)
        keys = keys + first
        if self.tile is not None:  # merge with the best of the previous tiles, in lists of fixed length
            before = self.closest.get(queries.start, (costs[..., :0], keys[..., :0]))
            costs, order = torch.cat([before[0], costs], 2).sort(dim=2, stable=True)
            keys = torch.cat([before[1], keys], 2).gather(2, order)
            missing = max(0, CLOSEST + 1 - costs.shape[2])
            costs = F.pad(costs[..., : CLOSEST + 1], (0, missing), value=torch.inf)
            keys = F.pad(keys[..., : CLOSEST + 1], (0, missing))
        self.closest[queries.start] = costs, keys
        return costs[..., 0]

    def found(self) -> Found:
        lists = [self.closest[start] for start in sorted(self.closest)]
        costs, keys = (torch.cat(parts, 1) for parts in zip(*lists, strict=True))
        is_candidate = costs < torch.inf
        return Found(best_of(self.query, self.rows.scale, keys, is_candidate), is_candidate.any(2))


def _closest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest costs along the last dimension and their indices; the first of the lowest comes first."""
    lowest = cost.min(2, keepdim=True)  # the order of topk is undefined for equal values
    most = CLOSEST + 1
    if torch.compiler.is_compiling():  # sizes may be symbolic
        cost = F.pad(cost, (0, most), value=torch.inf)
    else:
        most = min(most, cost.shape[2])
    others = cost.topk(most, 2, largest=False)
    costs = others.values.masked_fill(others.indices == lowest.indices, torch.inf)
    return torch.cat([lowest.values, costs], 2), torch.cat([lowest.indices, others.indices], 2)
