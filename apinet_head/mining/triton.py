"""Pair mining in fused Triton kernels, for CUDA: no matrix of distances in memory, few launches.

See `triton_search` for the formulas, and `dense` for the same in plain PyTorch. Memory beyond the features is one copy
of them in order of class, and a few numbers a row. Small batches are searched as they are, without that copy.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from apinet_head._checks import describe
from apinet_head.mining import tiled, triton_rows, triton_search
from apinet_head.mining.contract import Found, Search
from apinet_head.mining.triton_tiles import Tiles, tiles_for

NOBODY: int = triton_search.NOBODY.value
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DIRECT = 512 * 512  # up to so many pairs of rows, sorting and centring cost more than they save
SIGNS = {"similar": 1, "dissimilar": -1}
HALF = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ROWS, CHANNELS = (16, 32) if INTERPRETED else (4, 512)  # what one program reads at a time; ROWS divides the tiles
SHARE = 256  # rows whose sum one program takes


def mine(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
) -> Found:
    """See `contract.Backend`. Tensor cores are no place for float64: `tiled` takes that.

    Raises:
        ValueError: the features are not on a CUDA device, or on one that is too old.
    """
    if not features.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs features on a CUDA device, got {describe(features)}: move them there, or take "
            "backend='auto'; to debug on a CPU, set the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    if features.dtype == torch.float64:
        return tiled.mine(features, labels, keys, key_labels, key_offset, searches)
    signs = {search.same_class: SIGNS[search.how] for search in searches}
    partner, valid = find_partners(
        features.detach(), labels, None if keys is None else keys.detach(), key_labels, key_offset,
        signs.get(True, 0), signs.get(False, 0),
    )  # fmt: skip
    return Found(partner, valid)  # the operator puts the same class first, as the searches do


class _Rows(NamedTuple):
    """Features [N,D] in a dtype that the kernels know, every row in one piece, and their labels [N] int64."""

    x: Tensor
    labels: Tensor


class _InOrder(NamedTuple):
    """Rows of one class side by side; N and D are filled up to whole tiles, but for `classes` and `order` [N]."""

    classes: Tensor  # sorted labels
    order: Tensor  # where the rows came from, int64
    origin: Tensor  # the same, int32
    y: Tensor  # [N,1 or 2,D] in half precision, see `triton_rows`
    squares: Tensor  # [N]
    weights: Tensor | None  # [N], if y had to be made smaller


# One operator for all of it: torch.compile and torch.export need not see what it launches.
@torch.library.custom_op(
    "apinet_head::find_partners",
    mutates_args=(),
    schema="(Tensor features, Tensor labels, Tensor? keys, Tensor key_labels, SymInt? key_offset, int intra, int inter)"
    " -> (Tensor, Tensor)",
)
def find_partners(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    intra: int,
    inter: int,
) -> tuple[Tensor, Tensor]:
    """Partners and valid, [searches,B] each. `intra`, `inter`: 1 for the nearest, -1 for the farthest, 0 for none."""
    # Rows of two dtypes, or of one that the kernels don't know, meet in float32.
    alike = keys is None or keys.dtype == features.dtype
    dtype = features.dtype if alike and features.dtype in HALF else torch.float32
    queries = _rows(features, labels, dtype)
    others = queries if keys is None else _rows(keys, key_labels, dtype)
    count, size = queries.x.shape[0], others.x.shape[0]
    offset = size if key_offset is None else key_offset  # nobody is so far down
    with _on(features.device):
        best = torch.full((abs(intra) + abs(inter), count), NOBODY, dtype=torch.int64, device=features.device)
        find = _find_directly if count * size <= DIRECT else _find_in_order
        best = find(queries, others, offset, intra, inter, best)
        return best & 0xFFFFFFFF, best != NOBODY


@find_partners.register_fake
def _(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    intra: int,
    inter: int,
) -> tuple[Tensor, Tensor]:
    size = (abs(intra) + abs(inter), features.shape[0])
    return features.new_empty(size, dtype=torch.int64), features.new_empty(size, dtype=torch.bool)


def _find_directly(queries: _Rows, keys: _Rows, offset: int, intra: int, inter: int, best: Tensor) -> Tensor:
    symmetric = keys is queries
    (count, dim), size = queries.x.shape, keys.x.shape[0]
    tiles = tiles_for(_capability(best.device), "direct", count * size)
    top = torch.zeros(1, dtype=torch.int32, device=best.device)
    peaks = _measure(keys.x, top)
    triton_search.search_directly[_grid(count, size, tiles.side, symmetric)](
        queries.x, keys.x, queries.labels, keys.labels, peaks, top, best,
        count, size, dim, queries.x.stride(0), keys.x.stride(0), offset,
        INTRA=intra, INTER=inter, SYMMETRIC=symmetric, SCALED=keys.x.dtype != torch.float16,
        SIDE=tiles.side, CHANNELS=tiles.channels, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return best


def _find_in_order(queries: _Rows, keys: _Rows, offset: int, intra: int, inter: int, best: Tensor) -> Tensor:
    symmetric, split = keys is queries, keys.x.dtype not in HALF
    count, size = queries.x.shape[0], keys.x.shape[0]
    tiles = tiles_for(_capability(best.device), "float32" if split else "half", count * size)
    tops = torch.zeros(2, dtype=torch.int32, device=best.device)
    peaks = _measure(keys.x, tops[:1])
    if symmetric:
        shift = _shift([(keys.x, peaks)], tops)
        found = among = _in_order(keys, peaks, tops, shift, tiles)
    else:
        query_peaks = _measure(queries.x, tops[1:])
        shift = _shift([(keys.x, peaks), (queries.x, query_peaks)], tops)
        among = _in_order(keys, peaks, tops, shift, tiles)
        found = _in_order(queries, query_peaks, tops, shift, tiles, elsewhere=split)
    triton_search.search[_grid(count, size, tiles.side, symmetric)](
        found.y, among.y, among.squares, found.weights, found.origin, among.origin,
        torch.searchsorted(among.classes, found.classes, out_int32=True),
        torch.searchsorted(among.classes, found.classes, out_int32=True, right=True),
        best, count, size, among.y.shape[2], offset,
        INTRA=intra, INTER=inter, SYMMETRIC=symmetric, SPLIT=split,
        SIDE=tiles.side, CHANNELS=tiles.channels, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return torch.empty_like(best).index_copy_(1, found.order, best)


def _measure(x: Tensor, top: Tensor) -> Tensor:
    """The bits of the largest absolute value of each row [N]; the largest finite one goes to `top` [1]."""
    peaks = torch.empty(x.shape[0], dtype=torch.int32, device=x.device)
    grid = (_parts(x.shape[0], ROWS),)
    triton_rows.measure[grid](x, peaks, top, *x.shape, x.stride(0), ROWS=ROWS, CHANNELS=CHANNELS)
    return peaks


def _shift(sets: list[tuple[Tensor, Tensor]], tops: Tensor) -> Tensor:
    """What is subtracted from all scaled rows [D], given those of the keys and of other queries, with their peaks."""
    x, dim = sets[0][0], sets[0][0].shape[1]
    shares = [_parts(x.shape[0], SHARE) for x, _ in sets]
    sums, lows, highs = torch.empty(3, sum(shares), dim, dtype=torch.float32, device=x.device)
    counts = torch.empty(sum(shares), dtype=torch.int32, device=x.device)
    half, first = HALF.get(x.dtype), 0
    for (x, peaks), share in zip(sets, shares, strict=True):
        lines = slice(first, first + share)
        triton_rows.summarise[(_parts(dim, 64), share)](
            x, peaks, tops, sums[lines], lows[lines], highs[lines], counts[lines], *x.shape, x.stride(0),
            SCALED=x.dtype != torch.float16, SPLIT=half is None, SHARE=SHARE, ROWS=32, CHANNELS=64,
        )  # fmt: skip
        first += share
    shift = torch.empty(dim, dtype=torch.float32, device=x.device)
    triton_rows.choose_shift[(_parts(dim, 64),)](
        sums, lows, highs, counts, shift, shares[0], first, dim, EXACT_IN=half, LINES=32, CHANNELS=64
    )
    return shift


def _in_order(
    rows: _Rows, peaks: Tensor, tops: Tensor, shift: Tensor, tiles: Tiles, *, elsewhere: bool = False
) -> _InOrder:
    """`elsewhere`: the rows are not the ones that the scale was made for, and may be out of float16's range."""
    x, split = rows.x, rows.x.dtype not in HALF
    length, width = _parts(x.shape[0], tiles.side) * tiles.side, _parts(x.shape[1], tiles.channels) * tiles.channels
    classes, order = rows.labels.sort(stable=True)
    y = x.new_empty((length, 1 + split, width), dtype=torch.float16 if split else x.dtype)
    origin = torch.empty(length, dtype=torch.int32, device=x.device)
    squares = torch.empty(length, dtype=torch.float32, device=x.device)
    weights = torch.empty_like(squares) if elsewhere else None
    triton_rows.lay_out[(_parts(length, ROWS),)](
        x, order, peaks, tops, shift, y, squares, origin, weights, *x.shape, x.stride(0), width,
        SCALED=x.dtype != torch.float16, SPLIT=split, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return _InOrder(classes, order, origin, y, squares, weights)


def _grid(queries: int, keys: int, side: int, symmetric: bool) -> tuple[int]:
    """How many tiles `triton_search.place` finds a place for."""
    height, width = _parts(queries, side), _parts(keys, side)
    return ((height + 1) // 2 * (width + 1) if symmetric else height * width,)


def _parts(size: int, part: int) -> int:
    return -(-size // part)


def _rows(features: Tensor, labels: Tensor, dtype: torch.dtype) -> _Rows:
    x = features.to(dtype)
    return _Rows(x if x.stride(1) == 1 else x.contiguous(), labels.to(torch.int64).contiguous())


def _capability(device: torch.device) -> int:
    """8.6 as 86; 0 stands for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(f"backend='triton' needs a GPU of compute capability 8.0 or newer, got {major}.{minor}")
    return major * 10 + minor


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
