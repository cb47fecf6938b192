"""The last word on near neighbours: distances by subtraction, of the few candidates that products cannot tell apart.

A cost |k|² - 2 q·k carries the rounding of |q|² and |k|². Where neighbours are much nearer to each other than to the
origin, as trained features are, that is more than what tells them apart.
"""

import torch
from torch import Tensor

from apinet_head.mining.query import Query, flip

ROUNDING = 32  # eps of |q|² + |q - k|² that two costs may be wrong by: each was seen to be by up to 12, for any D
CANCELLED = 8  # up to so many times |q - k|², |q|² costs no more than the rounding of any distance
CLOSEST = 8  # candidates that are compared again where the host doesn't wait to see how many are needed
AT_ONCE = 2**22  # numbers


def slack(query: Query, best: Tensor, squares: Tensor, cancelled: float = CANCELLED) -> Tensor:
    """By how much rounding may hide the true best behind the best cost [S,B]; 0 where that does no harm."""
    distance = flip(query.searches, best).clamp(min=0)
    rounding = ROUNDING * torch.finfo(best.dtype).eps * (squares + distance)
    return rounding.where((squares > cancelled * distance) & (squares < torch.inf) & (best < torch.inf), 0)


def settle(query: Query, partner: Tensor, search: Tensor, row: Tensor, key: Tensor) -> None:
    """Put the best of the candidates `key` of the queries `row` in `search`, all three [N], into partner [S,B]."""
    step = max(1, AT_ONCE // query.rows.shape[1])
    parts = zip(torch.split(row, step), torch.split(key, step), strict=True)
    distance = torch.cat([(query.features[i].double() - query.rows[j].double()).square().sum(1) for i, j in parts])
    for index, asked in enumerate(query.searches):
        cost = distance if asked.how == "similar" else -distance
        mine = search == index
        best = torch.full(partner.shape[1:], torch.inf, dtype=cost.dtype, device=cost.device)
        best.scatter_reduce_(0, row[mine], cost[mine], "amin")
        mine &= cost <= best[row]
        partner[index].scatter_reduce_(0, row[mine], key[mine], "amin", include_self=False)


def best_of(query: Query, scale: Tensor | None, key: Tensor, is_candidate: Tensor) -> Tensor:
    """Of candidates `key` [S,B,K], as far as they are some, the best by subtraction, and the first of equal ones [S,B].

    For all queries and with a fixed K, so that nothing waits for the device. Arbitrary where there is no candidate.
    """
    key = key.where(is_candidate, 0)
    searches, count, size = key.shape
    per_query = searches * size * query.rows.shape[1]
    step = None if torch.compiler.is_compiling() else max(1, AT_ONCE // per_query)
    parts = [slice(None)] if step is None else [slice(i, i + step) for i in range(0, count, step)]
    distance = torch.cat([_distances_of(query, scale, key, part) for part in parts], 1)
    cost = flip(query.searches, distance).nan_to_num(0.0).where(is_candidate, torch.inf)
    best = is_candidate & (cost <= cost.amin(2, keepdim=True))
    return key.where(best, query.rows.shape[0]).amin(2)


def _distances_of(query: Query, scale: Tensor | None, key: Tensor, part: slice) -> Tensor:
    key = key[:, part]
    keys = query.rows.index_select(0, key.flatten()).view(*key.shape, -1)
    difference = _wide(query.features[part], scale)[None, :, None] - _wide(keys, scale)
    return difference.square().sum(3)


def _wide(rows: Tensor, scale: Tensor | None) -> Tensor:
    """In float64 and in the scale, so that the square of a difference is a number, whatever finite rows there are."""
    rows = rows if rows.device.type == "mps" else rows.double()  # there is no float64 on MPS
    if scale is None:
        return rows
    rows = rows * scale
    edge = torch.finfo(rows.dtype).max ** 0.5 / (4 * rows.shape[-1] ** 0.5)
    return rows.clamp(-edge, edge)
