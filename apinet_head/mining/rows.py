"""Feature rows made ready for distances: one dtype, one scale, one centre, and a note of which are finite."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def prepare(queries: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Shift and scale all rows alike, which changes no comparison of distances but saves their accuracy.

    The mean goes because |k|² - 2qk cancels badly for rows far from the origin; the scale, a power of two and so
    exact, because squares of features near the ends of the number range would be infinite or zero.

    Returns:
        queries [B,D] and keys [M,D] (the same tensor if `keys` is None), float32 or float64, non-finite rows replaced;
        finite [M] bool.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    rows = (queries if keys is None else keys).detach().to(dtype)
    peak = _peaks(rows)
    finite = peak.isfinite()
    limit = -math.log2(torch.finfo(dtype).tiny)
    scale = torch.exp2(-peak.where(finite, 0).amax().log2().floor().clamp(-limit, limit))
    centred = _scaled(rows, finite, scale)
    centred.sub_(mean := centred.sum(0) / finite.sum().clamp(min=1))
    if keys is None:
        return centred, centred, finite

    others = queries.detach().to(dtype)
    # A query too far from all keys for its square to be a number is as good as at the edge of that range.
    edge = math.sqrt(torch.finfo(dtype).max) / (4 * rows.shape[1])
    others = _scaled(others, finite_rows(others), scale).sub_(mean).clamp_(-edge, edge)
    return others, centred, finite


def _scaled(rows: Tensor, finite: Tensor, scale: Tensor) -> Tensor:
    # In two steps, for on a CPU masked_fill by rows takes three times as long as both.
    return rows.nan_to_num(0.0, 0.0, 0.0).mul_(scale.where(finite, 0)[:, None])


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows hold numbers alone [N]."""
    return _peaks(rows.detach()).isfinite()


def _peaks(rows: Tensor) -> Tensor:
    """The largest absolute value of each row; NaN and infinity come through."""
    return torch.maximum(rows.amax(1), -rows.amin(1))  # an infinity norm says the same, 15 times slower on a CPU


def exact_products(device_type: str) -> AbstractContextManager[None]:
    """Within it, no autocast takes products in half precision, which is too coarse to rank near neighbours."""
    # Only where there is one to switch off: traced graphs stay plain, and the meta device knows none.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
