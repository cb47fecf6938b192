"""Feature rows prepared for distances: in float32 at least, finite, centred and scaled.

Centre and scale are those of the bulk of the rows, from the median of a sample, which is robust to outliers (a tenth of
the rows, of any size). Shifting and scaling all rows alike changes no comparison of distances.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from apinet_head.mining.query import Query, peaks

SAMPLE = 32  # rows whose median is the centre
BULK = -20  # rows of the bulk are scaled to about 2**BULK: outliers need more room above than near neighbours below
PIECE = 2**20  # numbers squared at a time on a CPU, where larger temporary tensors are slow: each is mapped anew
SYMMETRIC_FROM = 12_000_000  # multiplications, on a CPU: 120 rows of 830
ONEDNN = getattr(torch.backends.mkldnn, "matmul", None)

WHOLE = slice(None)


def part_of(rows: Tensor, part: slice) -> Tensor:
    """rows[part], at no cost for all of them."""
    return rows if part == WHOLE else rows[part]


class Rows:
    """Queries and keys, prepared a tile at a time to avoid a copy of all of them.

    Attributes:
        squares: |k|² of the prepared keys [M].
        query_squares: |q|² of the prepared queries [B].
        largest_query_square: of all queries, if known; infinity if some are zero or not finite.
        usable: which keys may be partners at all, [M] bool; None if all may.
        unlabelled: whether there may be queries without a class.
        eager: whether values can be read, see `is_eager_cpu`.
        odd: whether there may be prepared rows that are not finite.
        products: of all rows with each other [B,B], if computed for the squares.
        scale: a power of two that brings differences of the original rows into the range of their dtype.
    """

    usable: Tensor | None = None
    unlabelled, odd = True, False
    products: Tensor | None = None
    largest_query_square = math.inf

    def __init__(
        self,
        query: Query,
        tile: int | None,
        dtype: torch.dtype,
        eager: bool,
        centre: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        self.query, self.dtype, self.eager, self.centre, self.scale = query, dtype, eager, centre, scale
        if tile is None and query.keys is None and scale is None and self._is_worth_halving(query.features):
            # The squares are the diagonal of the products, which saves a pass over the rows.
            self.products = symmetric_products(query.features.to(dtype))
            self.squares = self.products.diagonal().clone()
        else:
            self.squares = self._squares(query.rows(), tile)
        self.query_squares = self.squares if query.keys is None else self._squares(query.features, tile)

    def queries(self, part: slice) -> Tensor:
        return self._prepared(part_of(self.query.features, part))

    def distances(self, queries: Tensor, down: slice, across: slice) -> Tensor:
        """Squared distances of the prepared queries of rows `down` from the keys of rows `across`."""
        squares = part_of(self.squares, across)
        if self.products is not None:
            distance = torch.sub(squares, self.products, alpha=2)
        elif self.query.keys is None and down == across and self._is_worth_halving(queries):
            distance = torch.sub(squares, symmetric_products(queries), alpha=2)
        else:
            distance = subtract_products(squares, queries, self._prepared(part_of(self.query.rows(), across)))
        distance.add_(part_of(self.query_squares, down)[:, None])
        # A query that is not finite still gets a partner.
        return distance.nan_to_num_(0.0, 0.0, 0.0) if self.odd else distance

    def _prepared(self, rows: Tensor) -> Tensor:
        rows = rows if rows.dtype == self.dtype else rows.to(self.dtype)
        if self.centre is None or self.scale is None:
            return rows
        # Rows whose square would overflow are clamped.
        edge = _edge(self.dtype, rows.shape[1])
        return torch.sub(rows.nan_to_num(0.0, 0.0, 0.0) * self.scale, self.centre * self.scale).clamp(-edge, edge)

    def _is_worth_halving(self, rows: Tensor) -> bool:
        """Whether `symmetric_products` is faster than the full product: for large products on a CPU."""
        return self.eager and rows.shape[0] ** 2 * rows.shape[1] >= SYMMETRIC_FROM

    def _squares(self, rows: Tensor, tile: int | None) -> Tensor:
        if tile is None and self.eager:
            tile = max(1, PIECE // rows.shape[1])
        if tile is None or rows.shape[0] <= tile:
            return self._prepared(rows).square().sum(1)
        return torch.cat([self._prepared(part).square().sum(1) for part in torch.split(rows, tile)])


def as_they_are(query: Query, tile: int | None) -> Rows | None:
    """The rows without preparation, for eager CPU tensors; None if a square would overflow or underflow."""
    rows = Rows(query, tile, torch.promote_types(query.features.dtype, torch.float32), eager=True)
    labelled = None if int(query.key_labels.min()) >= 0 else query.key_labels >= 0
    rows.unlabelled = labelled is not None if query.keys is None else int(query.labels.min()) < 0
    largest, rows.usable = _look(query.rows(), rows.squares, labelled)
    rows.odd = largest == math.inf
    if largest is not None and query.keys is not None:
        largest, _ = _look(query.features, rows.query_squares, None)
        rows.odd |= largest == math.inf
    if largest is None:
        return None
    rows.largest_query_square = largest
    return rows


def _look(rows: Tensor, squares: Tensor, asked: Tensor | None) -> tuple[float | None, Tensor | None]:
    """The largest square, and which rows are finite and asked for (None: all).

    The square is infinity if some rows are zero or not finite, and None if those of others are not in a safe range.
    """
    info = torch.finfo(squares.dtype)
    least, most = info.tiny / info.eps, info.max / 16
    bounds = squares.aminmax()
    low, high = bounds.min.item(), bounds.max.item()
    if least < low and high < most:
        return high, asked
    usable = (squares > least) & (squares < most)
    odd = usable.logical_not() if asked is None else usable.logical_not().logical_and_(asked)
    place = odd.nonzero()[:, 0]
    odd_rows = rows[place]
    finite = torch.linalg.vector_norm(odd_rows, torch.inf, 1) < torch.inf
    if finite.any():  # only rows of zeros have a safe square then
        usable.index_put_((place,), finite)
        if (odd_rows[finite] != 0).any():
            return None, None
    return math.inf, usable if asked is None else usable.logical_and_(asked)


def about_the_bulk(query: Query, tile: int | None, eager: bool, dtype: torch.dtype | None) -> Rows:
    """The rows shifted and scaled, without synchronisation or data-dependent operations."""
    largest_of_row = peaks(query.rows())
    usable = largest_of_row.isfinite() & (query.key_labels >= 0)
    dtype = dtype or torch.promote_types(query.features.dtype, torch.float32)
    centre, scale = bulk(query.rows(), usable)
    # As large as the largest row allows, to keep small distances from underflow, but not below the scale of the bulk.
    largest = largest_of_row.where(usable, 0).amax()
    if query.keys is not None:
        largest = torch.maximum(largest, peaks(query.features).nan_to_num(0.0, 0.0).amax().to(largest.dtype))
    top = torch.exp2((_edge(dtype, query.rows().shape[1]) / 4 / largest.to(dtype)).log2().floor())
    scale = torch.maximum(scale.to(dtype) * 2.0**BULK, top.nan_to_num(0.0, 0.0, 0.0))
    rows = Rows(query, tile, dtype, eager, centre.to(dtype), scale)
    rows.usable = usable
    return rows


def _edge(dtype: torch.dtype, dim: int) -> float:
    """The largest value of prepared rows with finite squared distances."""
    return float(torch.finfo(dtype).max ** 0.5 / (4 * dim**0.5))


def bulk(rows: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Centre [D] and scale (0-d) of the usable rows [N,D], from a sample."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # Sampled at multiples of the golden ratio, so that outliers at regular intervals do not fill the sample.
    count = usable.cumsum(0)
    rank = (torch.arange(1, SAMPLE + 1, device=rows.device) * 0.6180339887498949 % 1 * count[-1:]).long() + 1
    place = torch.searchsorted(count, rank).clamp(max=rows.shape[0] - 1)
    sample, middle = rows.index_select(0, place).to(dtype), (SAMPLE - 1) // 2
    centre = sample.sort(0).values[middle].nan_to_num(0.0, 0.0, 0.0)  # a median, and deterministic on every device
    # Halved, as the difference of two finite numbers may overflow.
    spread = (sample / 2 - centre / 2).abs().amax(1).sort().values
    # The lower quartile of rows that differ from the centre: most rows may be equal, and others outliers.
    same = (spread == 0).sum()
    quartile = (same + (SAMPLE - same).div(4, rounding_mode="floor")).clamp(max=SAMPLE - 1)
    typical = spread.index_select(0, quartile[None])[0]
    largest = peaks(rows).where(usable, 0).amax().to(dtype)
    typical = typical.where(typical.isfinite() & (typical > 0), largest)  # the sample is all the same
    limit = -math.log2(torch.finfo(dtype).tiny)
    exponent = (BULK - 1 - typical.log2().ceil()).nan_to_num(0.0, 0.0, 0.0).clamp(-limit, limit)
    return centre, torch.exp2(exponent)


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """Context in which products of float32 rows are in float32, without autocast; for TF32 see `subtract_products`."""
    # Only if enabled: this keeps traced graphs simple, and the meta device has no autocast.
    context: AbstractContextManager[object] = nullcontext()
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        context = torch.autocast(device_type, enabled=False)
    if device_type != "cpu" or torch.compiler.is_compiling():
        return context
    precision = getattr(ONEDNN, "fp32_precision", None)
    if precision is None:  # PyTorch before 2.9
        precision = "none" if torch.get_float32_matmul_precision() == "highest" else "reduced"
    return context if precision in ("none", "ieee") else _without_onednn(context)


@contextmanager
def _without_onednn(context: AbstractContextManager[object]) -> Iterator[None]:
    # torch.backends.mkldnn.flags would modify, and warn about, unrelated settings.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with context:
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def subtract_products(squares: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """squares - 2 queries @ keys.T [N,M], in full float32 precision even if TF32 is allowed."""
    if queries.dtype == torch.float32 and queries.device.type == "cuda" and _may_round_to_tf32():
        return torch.sub(squares, multiply_in_parts(queries, keys), alpha=2)
    return torch.addmm(squares, queries, keys.T, alpha=-2)


def _may_round_to_tf32() -> bool:
    if torch.compiler.is_compiling():  # the setting may change after compilation
        return True
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # allow_tf32 raises if this was set
    return bool(matmul.allow_tf32) if precision is None else precision == "tf32"


def multiply_in_parts(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T from products of factors that TF32 represents (almost) exactly: twice 11 bits are 22 of 24."""
    (high, low), (other_high, other_low) = _split(left), _split(right)
    return high @ other_high.T + (high @ other_low.T + low @ other_high.T)


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    high = (rows.view(torch.int32) & -0x2000).view(torch.float32)  # without the 13 bits that TF32 lacks
    return high, rows - high


def symmetric_products(rows: Tensor) -> Tensor:
    """rows @ rows.T [N,N] of rows [N,D], with a third of the products copied from above the diagonal."""
    size = rows.shape[0]
    products, columns = rows.new_empty(size, size), rows.T
    a, b = size // 3, 2 * size // 3
    torch.mm(rows[:a], columns, out=products[:a])
    torch.mm(rows[a:b], columns[:, a:], out=products[a:b, a:])
    torch.mm(rows[b:], columns[:, b:], out=products[b:, b:])
    products[a:, :a] = products[:a, a:].T
    products[b:, a:b] = products[a:b, b:].T
    return products
