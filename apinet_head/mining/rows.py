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
    limit = -math.log2(torch.finfo(dtype).tiny)

    def peaks(x: Tensor) -> Tensor:  # largest absolute value of each row; NaN and infinity come through
        peak: Tensor = torch.linalg.vector_norm(x, math.inf, dim=1)
        return peak

    peak = peaks(rows)
    finite = peak.isfinite()
    scale = torch.exp2(-peak.where(finite, 0).amax().log2().floor().clamp(-limit, limit))
    scaled = (rows * scale).where(finite[:, None], 0)
    mean = scaled.sum(0) / finite.sum().clamp(min=1)
    centred = scaled.sub_(mean)
    if keys is None:
        return centred, centred, finite

    others = queries.detach().to(dtype)
    # A query too far from all keys for its square to be a number is as good as at the edge of that range.
    edge = math.sqrt(torch.finfo(dtype).max) / (4 * rows.shape[1])
    others = (others * scale).sub(mean).clamp(-edge, edge).where(peaks(others).isfinite()[:, None], 0)
    return others, centred, finite


def exact_products(device_type: str) -> AbstractContextManager[None]:
    """Within it, no autocast takes products in half precision, which is too coarse to rank near neighbours."""
    # Only where there is one to switch off: traced graphs stay plain, and the meta device knows none.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
