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

from apinet_head.mining.exact import CANCELLED, CLOSEST, best_of, distances_of, settle, slack
from apinet_head.mining.query import Found, Query, is_eager_cpu, is_exporting
from apinet_head.mining.rows import WHOLE, Rows, about_the_bulk, as_they_are, full_precision, part_of

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
    eager = is_eager_cpu(query.features)
    with full_precision(query.features.device.type):
        # Where values can be read: most batches need no preparation, and some need float64.
        as_given = as_they_are(query, tile) if eager else None
        if as_given is not None:
            try:
                return _search(_Near, query, as_given, tile)
            except CrowdedError:
                pass
        rows = about_the_bulk(query, tile, eager, torch.float64 if eager or is_small(query) else None)
        return _search(_Best if rows.dtype == torch.float64 else _Closest, query, rows, tile)


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
    best = kind(query, rows, tile)
    # In this order of tiles each query sees its candidates in ascending order (as a column those before its own tile,
    # then as a row the others), so that of equal distances the one of the lowest index comes first.
    for down in _parts(0, count, tile):
        queries = rows.queries(down)
        for across in _parts(down.start if symmetric else 0, size, tile):
            cost = best.signed(rows.distances(queries, down, across).expand(len(query.searches), -1, -1))
            candidate = _candidates(query, down, across)
            best.take(down, _masked(cost, candidate, rows.usable, across), across.start or 0)
            if symmetric and down != across:
                best.take(across, _masked(cost.mT, candidate.mT, rows.usable, down), down.start)
    partner, valid = best.found()
    return Found(partner, valid & (query.labels >= 0) if rows.unlabelled else valid)


def _parts(first: int | None, size: int, tile: int | None) -> list[slice]:
    if tile is None:
        return [WHOLE]
    return [slice(start, min(start + tile, size)) for start in range(first or 0, size, tile)]


def _candidates(query: Query, down: slice, across: slice) -> Tensor:
    """For each search the keys of the class that it asks for, without the query itself, [S,rows,columns] bool."""
    same = part_of(query.labels, down)[:, None] == part_of(query.key_labels, across)
    candidates = torch.stack([same if search.same_class else ~same for search in query.searches])
    if query.key_offset is not None:
        itself = (down.start or 0) + query.key_offset - (across.start or 0)
        if -same.shape[0] < itself < same.shape[1]:
            candidates.diagonal(itself, 1, 2).fill_(False)
    return candidates


def _masked(cost: Tensor, candidate: Tensor, usable: Tensor | None, part: slice) -> Tensor:
    return torch.where(candidate if usable is None else candidate & part_of(usable, part), cost, torch.inf)


class _Best:
    """The best partner so far of each query in each search."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        self.query, self.rows, self.tile = query, rows, tile
        self.nearest = [search.how == "similar" for search in query.searches]
        if tile is not None:  # else `take` is called once
            shape, device = (len(query.searches), query.features.shape[0]), query.features.device
            self.cost = torch.full(shape, torch.inf, dtype=rows.dtype, device=device)
            self.partner = torch.zeros(shape, dtype=torch.int64, device=device)

    def signed(self, distances: Tensor) -> Tensor:
        """Costs of distances [S,...], or distances of costs: a cost is the distance, or negative for the farthest."""
        if all(self.nearest):
            return distances
        return torch.stack([part if near else -part for near, part in zip(self.nearest, distances, strict=True)])

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        """Update the queries from their costs [S,rows,columns] for the keys from `first` on.

        Returns:
            The lowest of these costs [S,rows].
        """
        if self.tile is None:
            self.cost, self.partner = cost.min(2)
            return self.cost
        best, partner = self.cost[:, queries], self.partner[:, queries]  # views
        if self.rows.eager:  # where amin is ten times as fast as argmin, which is computed for improved rows only
            lowest = cost.amin(2)
            better = lowest < best
            partner[better] = cost[better].argmin(1) + first
        else:
            lowest, nearest = cost.min(2)
            better = lowest < best
            partner.copy_((nearest + first).where(better, partner))
        best.copy_(lowest.where(better, best))
        return lowest

    def found(self) -> tuple[Tensor, Tensor]:
        """Partners and valid, [S,B]."""
        return self.partner, self.cost < torch.inf


class _Near(_Best):
    """As `_Best`, with all candidates that rounding may hide behind the best; subtraction decides among those."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        # A later tile may have a better candidate: collect with a safety factor.
        self.cancelled = CANCELLED if tile is None else CANCELLED / 2
        self.near: list[tuple[Tensor, ...]] = []

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        lowest = super().take(queries, cost, first)
        # One number for all queries, as most batches need no closer look.
        if not float(self.signed(lowest).amin()) * self.cancelled > self.rows.largest_query_square:
            best = self.cost[:, queries]
            margin = slack(self.signed(best), part_of(self.rows.query_squares, queries), self.cancelled)
            bound = best + margin
            search, row = ((lowest <= bound) & (margin > 0)).nonzero(as_tuple=True)
            costs = cost[search, row]
            which, column = (costs <= bound[search, row, None]).nonzero(as_tuple=True)
            if which.numel() > CROWD * margin.numel():
                raise CrowdedError
            if self.tile is not None or which.numel() > row.numel():
                found = search[which], row[which] + (queries.start or 0), column + first, costs[which, column]
                self.near.append(found)
        return lowest

    def found(self) -> tuple[Tensor, Tensor]:
        if self.near:
            search, row, key, cost = (torch.cat(parts) for parts in zip(*self.near, strict=True))
            bound = self.cost + slack(self.signed(self.cost), self.rows.query_squares)
            place = search * bound.shape[1] + row
            near = cost <= bound[search, row]
            near &= place[near].bincount(minlength=bound.numel())[place] > 1
            settle(self.query, self.nearest, self.partner, search[near], row[near], key[near])
        return super().found()


class _Closest(_Best):
    """The few best candidates of each query, a fixed number, so that nothing synchronises."""

    def __init__(self, query: Query, rows: Rows, tile: int | None) -> None:
        super().__init__(query, rows, tile)
        self.closest: dict[int, tuple[Tensor, Tensor]] = {}

    def take(self, queries: slice, cost: Tensor, first: int) -> Tensor:
        costs, keys = _closest(cost)
        keys, start = keys + first, queries.start or 0
        if self.tile is not None:  # merge with the best of the previous tiles, in lists of fixed length
            before = self.closest.get(start, (costs[..., :0], keys[..., :0]))
            costs, order = torch.cat([before[0], costs], 2).sort(dim=2, stable=True)
            keys = torch.cat([before[1], keys], 2).gather(2, order)
            missing = max(0, CLOSEST + 1 - costs.shape[2])
            costs = F.pad(costs[..., : CLOSEST + 1], (0, missing), value=torch.inf)
            keys = F.pad(keys[..., : CLOSEST + 1], (0, missing))
        self.closest[start] = costs, keys
        return costs[..., 0]

    def found(self) -> tuple[Tensor, Tensor]:
        lists = [self.closest[start] for start in sorted(self.closest)]
        costs, keys = (torch.cat(parts, 1) for parts in zip(*lists, strict=True))
        is_candidate = costs < torch.inf
        keys = keys.where(is_candidate, 0)
        cost = self.signed(distances_of(self.query, self.rows.scale, keys)).nan_to_num(0.0)
        return best_of(cost.where(is_candidate, torch.inf), keys), is_candidate.any(2)


def _closest(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest costs of each row and their indices; the first of the lowest comes first."""
    lowest = cost.min(2, keepdim=True)  # the order of topk is undefined for equal values
    most = CLOSEST + 1
    if torch.compiler.is_compiling():  # sizes may be symbolic
        cost = F.pad(cost, (0, most), value=torch.inf)
    else:
        most = min(most, cost.shape[2])
    others = cost.topk(most, 2, largest=False)
    costs = others.values.masked_fill(others.indices == lowest.indices, torch.inf)
    return torch.cat([lowest.values, costs], 2), torch.cat([lowest.indices, others.indices], 2)
