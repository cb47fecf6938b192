"""Pair mining with one [B,M] matrix of distances: the plain way, and the faster one for small batches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining.contract import Found, Search
from apinet_head.mining.products import exact_products, symmetric_products
from apinet_head.mining.rows import may_look, may_stay, prepare

SAMPLE = 8  # rows that tell whether it is worth a try to leave all of them as they are


def mine(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
) -> Found:
    """See `contract.Backend`."""
    with exact_products(features.device.type):
        products, squares, finite = _products(features, keys)
    # |q - k|² less |q|², which is the same for all candidates of a row.
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


def _products(features: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """q·k of all pairs of prepared rows [B,M], |k|² [M], and which keys are finite [M], None if all are."""
    if keys is not None:
        queries, rows, finite = prepare(features, keys)
        return queries @ rows.T, rows.square().sum(1), finite
    rows = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if may_look(rows):
        # The products themselves say whether the rows were ready for them, which saves the passes over the rows.
        sample = rows[:: max(1, rows.shape[0] // SAMPLE)]
        if may_stay(sample @ sample.T) and may_stay(products := symmetric_products(rows)):
            return products, products.diagonal().clone(), None  # contiguous: subtracts twice as fast
    _, rows, finite = prepare(rows, None)
    products = symmetric_products(rows)
    return products, products.diagonal(), finite
