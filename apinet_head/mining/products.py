"""Products of feature rows, for distances: in full precision, and those of a batch with itself once."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

SPLIT_FROM = 12_000_000  # multiplications, on a CPU: 120 rows of 830


def exact_products(device_type: str) -> AbstractContextManager[None]:
    """Within it, no autocast takes products in half precision, which is too coarse to rank near neighbours."""
    # Only where there is one to switch off: traced graphs stay plain, and the meta device knows none.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def symmetric_products(rows: Tensor) -> Tensor:
    """rows @ rows.T [N,N] of rows [N,D]."""
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
