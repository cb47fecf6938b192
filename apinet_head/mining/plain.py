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
        if not is_eager_cpu(query.features):
            rows = about_the_bulk(query, tile, torch.float64 if is_small(query) else None)
            return _search(_Best if rows.dtype == torch.float64 else _Closest, query, rows, tile)
        # Where values can be read: most batches need no preparation, and some need float64.
        as_given = as_they_are(query, tile)
        if as_given is not None:
            try:
                return _search(_Near, query, as_given, tile)
            except CrowdedError:
                pass
        return _search(_Best, query, about_the_bulk(query, tile, torch.float64), tile)


class CrowdedError(Exception):
    """Too many candidates are within rounding of each other."""


def is_small(query: Query) -> bool:
    """Whether products in float64, slow on most GPUs, are faster than comparing candidates again after float32."""
    if is_exporting():  # the program may run on batches of any size
        return False
    (count, size), dim = query.shape(), query.rows().shape[1]
    return query.features.device.type != "mps" and count * size * dim <= SMALL


def _search(kind: "type[_Best]", query: Query, rows: Rows, tile: int | None) -> Found:
    """Compute all distances tile by tile, and keep the best partners."""
    (count, size), symmetric = query.shape(), query.keys is None
    bests = [kind(query, rows, tile, search.how) for search in query.searches]
    # In this order of tiles each query sees its candidates in ascending order (as a column those before its own tile,
    # then as a row the others), so that of equal distances the one of the lowest index comes first.
    for down in _parts(0, count, tile):
        queries = rows.queries(down)
        for across in _parts(down.start if symmetric else 0, size, tile):
            distance = rows.distances(queries, down, across)
            for best, candidate in zip(bests, _candidates(query, down, across), strict=True):
                cost = distance if best.nearest else -distance
                best.take(down, _masked(cost, candidate, rows.usable, across), across.start or 0)
                if symmetric and down != across:
                    best.take(across, _masked(cost.T, candidate.T, rows.usable, down), down.start)
    partners, valids = zip(*(best.found() for best in bests), strict=True)
    valid = torch.stack(valids)
    return Found(torch.stack(partners), valid & (query.labels >= 0) if rows.unlabelled else valid)


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
    """The best partner so far of each query in a search."""

    def __init__(self, query: Query, rows: Rows, tile: int | None, how: str) -> None:
        self.query, self.rows, self.tile, self.nearest = query, rows, tile, how == "similar"
        if tile is not None:  # else `take` is called once
            size, device = query.features.shape[0], query.features.device
            self.cost = torch.full((size,), torch.inf, dtype=rows.dtype, device=device)
            self.partner = torch.zeros(size, dtype=torch.int64, device=device)

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        """Update the queries from their costs [rows,columns] for the keys from `first` on.

        Returns:
            The lowest of these costs [rows].
        """
        if self.tile is None:
            self.cost, self.partner = cost.min(1)
            return self.cost
        best, partner = self.cost[queries], self.partner[queries]  # views
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

    def found(self) -> tuple[Tensor, Tensor]:
        """Partners and valid, [B]."""
        return self.partner, self.cost < torch.inf


class _Near(_Best):
    """As `_Best`, with all candidates that rounding may hide behind the best; subtraction decides among those."""

    def __init__(self, query: Query, rows: Rows, tile: int | None, how: str) -> None:
        super().__init__(query, rows, tile, how)
        # A later tile may have a better candidate: collect with a safety factor.
        self.cancelled = CANCELLED if tile is None else CANCELLED / 2
        self.near: list[tuple[Tensor, ...]] = []

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        lowest = super().take(queries, cost, first)
        # One number for all queries, as most batches need no closer look.
        if not float(self._distance(lowest).amin()) * self.cancelled > self.rows.largest_query_square:
            best = part_of(self.cost, queries)
            margin = slack(self._distance(best), part_of(self.rows.query_squares, queries), self.cancelled)
            bound = best + margin
            row = ((lowest <= bound) & (margin > 0)).nonzero()[:, 0]
            costs = cost[row]
            which, column = (costs <= bound[row, None]).nonzero(as_tuple=True)
            if which.numel() > CROWD * margin.numel():
                raise CrowdedError
            if self.tile is not None or which.numel() > row.numel():
                self.near.append((row[which] + (queries.start or 0), column + first, costs[which, column]))
        return lowest

    def _distance(self, cost: Tensor) -> Tensor:
        return cost if self.nearest else -cost

    def found(self) -> tuple[Tensor, Tensor]:
        if self.near:
            row, key, cost = (torch.cat(parts) for parts in zip(*self.near, strict=True))
            bound = self.cost + slack(self._distance(self.cost), self.rows.query_squares)
            near = cost <= bound[row]
            near &= row[near].bincount(minlength=len(bound))[row] > 1
            settle(self.query, self.nearest, self.partner, row[near], key[near])
        return super().found()


class _Closest(_Best):
    """The few best candidates of each query, a fixed number, so that nothing synchronises."""

    def __init__(self, query: Query, rows: Rows, tile: int | None, how: str) -> None:
        super().__init__(query, rows, tile, how)
        self.closest: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        costs, keys = _closest(cost)
        keys, start = keys + first, queries.start or 0
        if self.tile is not None:  # merge with the best of the previous tiles, in lists of fixed length
            before = self.closest.get(start, (costs[:, :0], keys[:, :0]))
            costs, order = torch.cat([before[0], costs], 1).sort(dim=1, stable=True)
            keys = torch.cat([before[1], keys], 1).gather(1, order)
            missing = max(0, CLOSEST + 1 - costs.shape[1])
            costs = F.pad(costs[:, : CLOSEST + 1], (0, missing), value=torch.inf)
            keys = F.pad(keys[:, : CLOSEST + 1], (0, missing))
        self.closest[start] = costs, keys
        return costs[:, 0]

    def found(self) -> tuple[Tensor, Tensor]:
        lists = [self.closest[start] for start in sorted(self.closest)]
        costs, keys = (torch.cat(parts) for parts in zip(*lists, strict=True))
        is_candidate = costs < torch.inf
        return best_of(self.query, self.nearest, self.rows.scale, keys, is_candidate), is_candidate.any(1)


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
