"""Exact comparison of near neighbours: distances by subtraction, for candidates within rounding of each other.

A cost |k|² - 2 q·k carries the rounding of |q|² and |k|². For neighbours that are much nearer to each other than to
the origin, as in trained features, this exceeds the differences of their distances.
"""

import torch
from torch import Tensor

from apinet_head.mining.query import Query

ROUNDING = 32  # bound of the error of two costs in eps (|q|² + |q - k|²); measured: up to 12 each, for any D
CANCELLED = 8  # cancellation is harmless while |q|² <= CANCELLED |q - k|²
CLOSEST = 8  # candidates compared again where reading the number needed would synchronise
AT_ONCE = 2**22  # numbers


def slack(distance: Tensor, squares: Tensor, cancelled: float = CANCELLED) -> Tensor:
    """By how much the cost of the true best of queries [N] may exceed the best cost due to rounding; 0 where harmless.

    Args:
        distance: [N], squared distances of the best; infinite where there is no candidate.
        squares: [N], |q|² of the queries.
        cancelled: cancellation is harmless while |q|² is at most this times the distance.
    """
    rounding = ROUNDING * torch.finfo(distance.dtype).eps * (squares + distance.clamp(min=0))
    return rounding.where((squares > cancelled * distance) & (squares < torch.inf) & distance.isfinite(), 0)


def settle(query: Query, nearest: list[bool], partner: Tensor, search: Tensor, row: Tensor, key: Tensor) -> None:
    """Write the best of the candidates `key` [N] of the queries `row` [N] in the searches [N] to partner [S,B]."""
    step = max(1, AT_ONCE // query.rows().shape[1])
    parts = zip(torch.split(row, step), torch.split(key, step), strict=True)
    distance = torch.cat([(query.features[i].double() - query.rows()[j].double()).square().sum(1) for i, j in parts])
    cost = distance.where(torch.tensor(nearest, device=row.device)[search], -distance)
    place, partner = search * partner.shape[1] + row, partner.view(-1)
    best = cost.new_full(partner.shape, torch.inf).scatter_reduce_(0, place, cost, "amin")
    is_best = cost <= best[place]
    partner.scatter_reduce_(0, place[is_best], key[is_best], "amin", include_self=False)


def best_of(cost: Tensor, key: Tensor) -> Tensor:
    """Of the keys [S,B,K] those of the lowest cost, the first of equal ones [S,B]; arbitrary where all are infinite."""
    best = (cost < torch.inf) & (cost <= cost.amin(2, keepdim=True))
    return key.where(best, torch.iinfo(key.dtype).max).amin(2)


def distances_of(query: Query, scale: Tensor | None, key: Tensor) -> Tensor:
    """Squared distances of the queries from keys [S,B,K] by subtraction, without synchronisation."""
    count, size = key.shape[1], key.shape[0] * key.shape[2]
    step = None if torch.compiler.is_compiling() else max(1, AT_ONCE // (size * query.rows().shape[1]))
    parts = [slice(None)] if step is None else [slice(i, i + step) for i in range(0, count, step)]
    return torch.cat([_distances_of(query, scale, key[:, part], part) for part in parts], 1)


def _distances_of(query: Query, scale: Tensor | None, key: Tensor, part: slice) -> Tensor:
    keys = query.rows().index_select(0, key.flatten()).view(*key.shape, -1)
    difference = _wide(query.features[part], scale)[:, None] - _wide(keys, scale)
    return difference.square().sum(3)


def _wide(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows in float64 and scaled, so that squared differences of finite rows are finite."""
    rows = rows if rows.device.type == "mps" else rows.double()  # there is no float64 on MPS
    if scale is None:
        return rows
    rows = rows * scale
    edge = torch.finfo(rows.dtype).max ** 0.5 / (4 * rows.shape[-1] ** 0.5)
    return rows.clamp(-edge, edge)
