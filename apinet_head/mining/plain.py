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
from apinet_head.mining.query import Found, Query, is_eager_cpu, is_exporting
from apinet_head.mining.rows import (
    WHOLE,
    Rows,
    about_the_bulk,
    as_they_are,
    no_autocast,
    no_reduced_precision,
    part_of,
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
        return _search((_Best if rows.dtype == torch.float64 else _Closest)(query, rows, tile))


def _mine_eager_cpu(query: Query, tile: int | None) -> Found:
    """`_mine` where values can be read: most batches need no preparation, and some need float64."""
    rows = as_they_are(query, tile)
    if rows is not None:
        found = _search(near := _Near(query, rows, tile))
        if not near.crowded:
            return found
    return _search(_Best(query, about_the_bulk(query, tile, torch.float64), tile))


def is_small(query: Query) -> bool:
    """Whether products in float64, slow on most GPUs, are faster than comparing candidates again after float32."""
    if is_exporting():  # the program may run on batches of any size
        return False
    (count, size), dim = query.shape(), query.rows().shape[1]
    return query.features.device.type != "mps" and count * size * dim <= SMALL


def _search(best: "_Best") -> Found:
    """Compute all distances tile by tile, and keep the best partners."""
    query, rows, tile = best.query, best.rows, best.tile
    (count, size), symmetric = query.shape(), query.keys is None
    # In this order of tiles each query sees its candidates in ascending order (as a column those before its own tile,
    # then as a row the others), so that of equal distances the one of the lowest index comes first.
    for down in _parts(0, count, tile):
        queries = rows.queries(down)
        for across in _parts(down.start if symmetric else 0, size, tile):
            if best.crowded:
                break
            mirrored = symmetric and down != across
            distance = rows.distances(queries, down, across)
            for place, candidate in enumerate(_candidates(query, down, across)):
                cost = distance if query.searches[place].how == "similar" else -distance
                best.take(place, down, _masked(cost, candidate, rows.usable, across), across.start or 0)
                if mirrored:
                    best.take(place, across, _masked(cost.T, candidate.T, rows.usable, down), down.start)
    found = best.found()
    return Found(found.partner, found.valid & (query.labels >= 0)) if rows.unlabelled else found


def _parts(first: int | None, size: int, tile: int | None) -> list[slice]:
    if tile is None:
        return [WHOLE]
    return [slice(start, min(start + tile, size)) for start in range(first or 0, size, tile)]


def _candidates(query: Query, down: slice, across: slice) -> list[Tensor]:
    """For each search the keys of the class that it asks for, without the query itself, [rows,columns] bool."""
    same = part_of(query.labels, down)[:, None] == part_of(query.key_labels, across)
    candidates = [same if search.same_class else ~same for search in query.searches]
    if query.key_offset is not None:
        itself = (down.start or 0) + query.key_offset - (across.start or 0)
        if -same.shape[0] < itself < same.shape[1]:
            for search, candidate in zip(query.searches, candidates, strict=True):
                if search.same_class or query.keys is not None:  # in a batch, it is of its own class
                    candidate.diagonal(itself).fill_(False)
    return candidates


def _masked(cost: Tensor, candidate: Tensor, usable: Tensor | None, part: slice) -> Tensor:
    return torch.where(candidate if usable is None else candidate & part_of(usable, part), cost, torch.inf)


class _Best:
    """The best partner so far of each query in each search.

    Attributes:
        crowded: whether the search is given up, as too many candidates are within rounding.
    """

    crowded = False

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        self.query, self.rows, self.tile = query, rows, tile
        self.cost: list[Tensor] = []  # of each search, [B], as `partner`
        self.partner: list[Tensor] = []
        if tile is not None:
            like, size = query.features, query.features.shape[0]
            self.cost = [like.new_full((size,), torch.inf, dtype=rows.dtype) for _ in query.searches]
            self.partner = [like.new_zeros(size, dtype=torch.int64) for _ in query.searches]

    def take(self, place: int, queries: slice, cost: Tensor, first: int) -> Tensor:
        """Update the queries in search number `place` from their costs [rows,columns] for the keys from `first` on.

        Returns:
            The lowest of these costs [rows].
        """
        if self.tile is None:  # the only tile
            lowest, partner = cost.min(1)
            self.cost.append(lowest)
            self.partner.append(partner)
            return lowest
        best, partner = self.cost[place][queries], self.partner[place][queries]  # views
        if is_eager_cpu(cost):  # where amin is ten times as fast as argmin, which is computed for improved rows only
            lowest = cost.amin(1)
            better = lowest < best
            partner[better] = cost[better].argmin(1) + first
        else:
            lowest, nearest = cost.min(1)
            better = lowest < best
            partner.copy_((nearest + first).where(better, partner))
        best.copy_(lowest.where(better, best))
        return lowest

    def found(self) -> Found:
        return Found(torch.stack(self.partner), torch.stack(self.cost) < torch.inf)


class _Near(_Best):
    """As `_Best`, with all candidates that rounding may hide behind the best; subtraction decides among those."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        # A later tile may have a better candidate: collect with a safety factor.
        self.cancelled = CANCELLED if tile is None else CANCELLED / 2
        self.near: list[list[tuple[Tensor, ...]]] = [[] for _ in query.searches]

    def take(self, place: int, queries: slice, cost: Tensor, first: int) -> Tensor:
        lowest = super().take(place, queries, cost, first)
        # One number for all queries, as most batches need no closer look.
        if not float(self._distance(place, lowest).amin()) * self.cancelled > self.rows.largest_query_square:
            best = part_of(self.cost[place], queries)
            margin = slack(self._distance(place, best), part_of(self.rows.query_squares, queries), self.cancelled)
            bound = best + margin
            row = ((lowest <= bound) & (margin > 0)).nonzero()[:, 0]
            costs = cost[row]
            which, column = (costs <= bound[row, None]).nonzero(as_tuple=True)
            self.crowded |= which.numel() > CROWD * margin.numel()
            if self.tile is not None or which.numel() > row.numel():
                self.near[place].append((row[which] + (queries.start or 0), column + first, costs[which, column]))
        return lowest

    def _distance(self, place: int, cost: Tensor) -> Tensor:
        return cost if self.query.searches[place].how == "similar" else -cost

    def found(self) -> Found:
        for place, near in enumerate(self.near):
            if near and not self.crowded:
                row, key, cost = (torch.cat(parts) for parts in zip(*near, strict=True))
                best = self.cost[place]
                bound = best + slack(self._distance(place, best), self.rows.query_squares)
                is_near = cost <= bound[row]
                is_near &= row[is_near].bincount(minlength=len(best))[row] > 1
                settle(self.query, self.query.searches[place].how, self.partner[place], row[is_near], key[is_near])
        return super().found()


class _Closest(_Best):
    """The few best candidates of each query, a fixed number, so that nothing synchronises."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        self.closest: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in query.searches]

    def take(self, place: int, queries: slice, cost: Tensor, first: int) -> Tensor:
        costs, keys = _closest(cost)
        keys, start = keys + first, queries.start or 0
        if self.tile is not None:  # merge with the best of the previous tiles, in lists of fixed length
            before = self.closest[place].get(start, (costs[:, :0], keys[:, :0]))
            costs, order = torch.cat([before[0], costs], 1).sort(dim=1, stable=True)
            keys = torch.cat([before[1], keys], 1).gather(1, order)
            missing = max(0, CLOSEST + 1 - costs.shape[1])
            costs = F.pad(costs[:, : CLOSEST + 1], (0, missing), value=torch.inf)
            keys = F.pad(keys[:, : CLOSEST + 1], (0, missing))
        self.closest[place][start] = costs, keys
        return costs[:, 0]

    def found(self) -> Found:
        costs, keys = (
            torch.stack(
                [torch.cat([of_search[start][kind] for start in sorted(of_search)]) for of_search in self.closest]
            )
            for kind in (0, 1)
        )
        is_candidate = costs < torch.inf
        return Found(best_of(self.query, self.rows.scale, keys, is_candidate), is_candidate.any(2))


def _closest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest costs of each row and their indices; the first of the lowest comes first."""
    lowest = cost.min(1, keepdim=True)  # the order of topk is undefined for equal values
    most = CLOSEST + 1
    if torch.compiler.is_compiling():  # sizes may be symbolic
        cost = F.pad(cost, (0, most), value=torch.inf)
    else:
        most = min(most, cost.shape[1])
    others = cost.topk(most, 1, largest=False)
    costs = others.values.masked_fill(others.indices == lowest.indices, torch.inf)
    return torch.cat([lowest.values, costs], 1), torch.cat([lowest.indices, others.indices], 1)
