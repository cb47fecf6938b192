"""Pair mining with one [B,M] matrix of distances: the plain way, and the faster one for small batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining.contract import Found, Search
from apinet_head.mining.rows import exact_products, prepare

SPLIT_FROM = 12_000_000  # multiplications, on a CPU: 120 rows of 830


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
    candidate = torch.stack([same if search.same_class else ~same for search in searches])
    if finite is not None:
        candidate.logical_and_(finite)
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
    size, dim = rows.shape
    # A traced size can't be split, and a small product is over before its parts are set up.
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or size * size * dim < SPLIT_FROM:
        return rows @ rows.T
    # What lies below the diagonal is known from above it. On a CPU, a third less to multiply outweighs the copies.
    products, columns = rows.new_empty(size, size), rows.T
    a, b = size // 3, 2 * size // 3
    torch.mm(rows[:a], columns, out=products[:a])
    torch.mm(rows[a:b], columns[:, a:], out=products[a:b, a:])
    torch.mm(rows[b:], columns[:, b:], out=products[b:, b:])
    products[a:, :a] = products[:a, a:].T
    products[b:, a:b] = products[a:b, b:].T
    return products
