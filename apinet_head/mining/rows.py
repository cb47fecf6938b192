"""Feature rows made ready for distances: one dtype, one scale, one centre, and a note of which are finite."""

import math

import torch
from torch import Tensor


def prepare(queries: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Shift and scale all rows alike, which changes no comparison of distances but saves their accuracy.

    The mean goes because |k|² - 2qk cancels badly for rows far from the origin; the scale, a power of two and so
    exact, because squares of features near the ends of the number range would be infinite or zero.
    Where a look on the CPU tells that neither is needed, the rows stay as they are.

    Returns:
        queries [B,D] and keys [M,D] (the same tensor if `keys` is None), float32 or float64, non-finite rows replaced;
        finite [M] bool, None where it is known that all are.
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries = queries.detach().to(dtype)
    rows = queries if keys is None else keys.detach().to(dtype)
    # On a CPU a look costs less than the passes over the rows that it saves.
    if may_look(rows):
        mean = rows.sum(0) / rows.shape[0]
        squares = _squares(rows)
        if keys is None and _may_stay(squares, rows.shape[0] * _squares(mean), dtype):
            return rows, rows, None
        centred = rows - mean
        others = centred if keys is None else queries - mean
        if _ordinary(_squares(centred), dtype) and (keys is None or _ordinary(_squares(others), dtype)):
            return others, centred, None
    return _prepare_unseen(queries, keys, rows)


def may_look(rows: Tensor) -> bool:
    """Whether a number of these can be read without waiting for a device: tensors on the CPU that are there now."""
    return rows.device.type == "cpu" and type(rows) is Tensor and not torch.compiler.is_compiling()


def _squares(numbers: Tensor) -> float:
    """The sum of the squares of all numbers."""
    flat = numbers.flatten()
    return float(flat.dot(flat))


def may_stay(products: Tensor) -> bool:
    """Whether `prepare` would leave rows as they are, by their products with each other [N,N] on the CPU."""
    return _may_stay(float(products.trace()), float(products.sum()) / products.shape[0], products.dtype)


def _may_stay(squares: float, of_mean: float, dtype: torch.dtype) -> bool:
    """Whether rows are ordinary and not far from the origin: without their mean they keep half of their squares.

    Their distances then lose one bit at most.
    """
    return _ordinary(squares, dtype) and of_mean < squares / 2


def _ordinary(squares: float, dtype: torch.dtype) -> bool:
    """Whether rows with this sum of squares are finite, and their products neither infinite nor lost near 0."""
    edge = math.sqrt(torch.finfo(dtype).tiny)
    return edge < squares < 1 / edge


def _prepare_unseen(queries: Tensor, keys: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`prepare` for whatever may come: as many operations, whatever the numbers are."""
    dtype = rows.dtype
    peak = _peaks(rows)
    finite = peak.isfinite()
    limit = -math.log2(torch.finfo(dtype).tiny)
    scale = torch.exp2(-peak.where(finite, 0).amax().log2().floor().clamp(-limit, limit))
    centred = _scaled(rows, finite, scale)
    centred.sub_(mean := centred.sum(0) / finite.sum().clamp(min=1))
    if keys is None:
        return centred, centred, finite

    # A query too far from all keys for its square to be a number is as good as at the edge of that range.
    edge = math.sqrt(torch.finfo(dtype).max) / (4 * rows.shape[1])
    others = _scaled(queries, finite_rows(queries), scale).sub_(mean).clamp_(-edge, edge)
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
