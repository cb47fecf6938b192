"""Pair mining with one [B,M] matrix of distances: the plain way, and the faster one for small batches."""

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
) -> Found:
    """See `contract.Backend`."""
    queries, rows, finite = prepare(features, keys)
    with exact_products(features.device.type):
        products = _symmetric_products(rows) if keys is None else queries @ rows.T
    # |q - k|² less |q|², which is the same for all candidates of a row.
    squares = products.diagonal() if keys is None else rows.square().sum(1)
    distance = torch.sub(squares, products, alpha=2)

    same = labels[:, None] == key_labels
    candidate = torch.stack([same if search.same_class else ~same for search in searches]).logical_and_(finite)
    if key_offset is not None:
        candidate.diagonal(key_offset, 1, 2).fill_(False)  # a row and itself
    # Of equal ones, min takes the first.
    cost, partner = torch.where(candidate, cost_of(searches, distance), torch.inf).min(2)
    return Found(partner, cost < torch.inf)


def cost_of(searches: Sequence[Search], distance: Tensor) -> Tensor:
    """What each search wants least of, given distances [rows,columns]: that, or one such matrix per search."""
    if all(search.how == "similar" for search in searches):
        return distance
    return torch.stack([distance if search.how == "similar" else -distance for search in searches])


def _symmetric_products(rows: Tensor) -> Tensor:
    """rows @ rows.T."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():  # a traced size can't be split
        return rows @ rows.T
    # What lies below the diagonal is known from above it. On a CPU, a third less to multiply outweighs the copies.
    products = rows.new_empty(rows.shape[0], rows.shape[0])
    first = 0
    for block in rows.tensor_split(3):
        last = first + block.shape[0]
        products[first:last, first:] = block @ rows[first:].T
        products[last:, first:last] = products[first:last, last:].T
        first = last
    return products
