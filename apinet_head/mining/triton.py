"""Pair mining in Triton kernels, for CUDA: no matrix of distances in memory, few launches.

A small batch takes one launch (`triton_direct`). A large one is searched on tensor cores (`triton_search`), and the
few best candidates of each query are compared again (`triton_direct`). `plain` is the same in plain PyTorch. Memory
beyond the features is for large batches a copy of them in order of class, as large as in float32.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apinet_head._checks import describe
from apinet_head.mining import plain
from apinet_head.mining.query import Found, Query
from apinet_head.mining.rows import BULK, SAMPLE
from apinet_head.mining.triton_direct import choose, search_directly
from apinet_head.mining.triton_rows import find_centre, lay_out, look
from apinet_head.mining.triton_search import NO_CANDIDATE, SLOTS, search
from apinet_head.mining.triton_tiles import Tiles, tiles_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIGNS = {"similar": 1, "dissimilar": -1}
# What one program reads at a time, in `lay_out`, where ROWS divides the tiles, and by subtraction.
ROWS, CHANNELS = (32, 64) if INTERPRETED else (4, 512)
DIRECT_ROWS, DIRECT_CHANNELS = (128, 128) if INTERPRETED else (32, 128)
# Up to so many differences for a query, and for all, subtracting takes less time than tensor cores and what they need.
DIRECT_OF_ONE, DIRECT = 2**19, 2**28


def mine(query: Query) -> Found:
    """Search with the kernels; float64, for which there are none, in plain PyTorch.

    Raises:
        ValueError: the features are not on a CUDA device, or on one that is too old.
    """
    features = query.features
    if not features.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs features on a CUDA device, got {describe(features)}: move them there, or take "
            "backend='auto'; to debug on a CPU, set the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    if features.dtype == torch.float64:
        return plain.mine_dense(query) if plain.is_small(query) else plain.mine_tiled(query)
    signs = {asked.same_class: SIGNS[asked.how] for asked in query.searches}
    *arguments, _ = query
    return Found(*find_partners(*arguments, signs.get(True, 0), signs.get(False, 0)))


class _Job(NamedTuple):
    """Arguments of `find_partners`, ready for the kernels, and the results to fill."""

    features: Tensor
    labels: Tensor
    keys: Tensor
    key_labels: Tensor
    symmetric: bool  # the features are searched among themselves
    offset: int  # of query 0 in the keys; the number of keys, which is the index of none, if queries are not among them
    intra: int
    inter: int
    partner: Tensor
    valid: Tensor


class _InOrder(NamedTuple):
    """Rows of one class side by side; N is filled up to whole tiles, but for `classes` and `order`."""

    classes: Tensor  # sorted labels
    order: Tensor  # where the rows came from, int64
    origin: Tensor  # the same, int32
    y: Tensor  # [N,2,D] float16, D filled up, see `triton_rows`
    weights: Tensor  # [N]
    squares: Tensor  # [N]


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
    features, size = _with_adjacent_channels(features), len(key_labels)
    partner = torch.empty(abs(intra) + abs(inter), len(features), dtype=torch.int64, device=features.device)
    job = _Job(
        features, labels.contiguous(), features if keys is None else _with_adjacent_channels(keys),
        key_labels.contiguous(), keys is None, size if key_offset is None else key_offset, intra, inter,
        partner, torch.empty_like(partner, dtype=torch.bool),
    )  # fmt: skip
    with _on(features.device):
        if is_direct(len(features), *job.keys.shape):
            _search_directly(job)
        else:
            _search_on_tensor_cores(job)
    return job.partner, job.valid


@find_partners.register_fake
def _(features: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, intra, inter = others
    size = (abs(intra) + abs(inter), features.shape[0])
    return features.new_empty(size, dtype=torch.int64), features.new_empty(size, dtype=torch.bool)


def is_direct(queries: int, keys: int, dim: int) -> bool:
    """Whether all distances are computed by subtraction."""
    return keys * dim <= DIRECT_OF_ONE and queries * keys * dim <= DIRECT


def _search_directly(job: _Job) -> None:
    count, size, dim = len(job.features), *job.keys.shape
    search_directly[(count,)](
        job.features, job.keys, job.labels, job.key_labels, job.partner, job.valid, count, size, job.offset, dim,
        job.features.stride(0), job.keys.stride(0), INTRA=job.intra, INTER=job.inter, ROWS=DIRECT_ROWS,
        CHANNELS=DIRECT_CHANNELS, num_warps=8,
    )  # fmt: skip


def _search_on_tensor_cores(job: _Job) -> None:
    (count, dim), size, device = job.features.shape, len(job.keys), job.features.device
    tiles = tiles_for(_capability(device), count * size)
    centre = torch.empty(dim, dtype=torch.float32, device=device)
    maxima = torch.zeros(SAMPLE + 2, dtype=torch.float32, device=device)
    spread, largest = maxima[:SAMPLE], maxima[SAMPLE:]
    usable = _look(job.keys, job.key_labels, largest)
    find_centre[(_parts(dim, 8),)](
        job.keys, usable.cumsum(0), centre, spread, size, size.bit_length(), dim, job.keys.stride(0), SAMPLE=SAMPLE,
        CHANNELS=8,
    )  # fmt: skip
    about = centre, spread, largest
    among = found = _in_order(job.keys, job.key_labels, usable, about, tiles)
    if not job.symmetric:
        usable = _look(job.features, job.labels, largest[1:])  # the scale is that of the keys
        found = _in_order(job.features, job.labels, usable, about, tiles)
    height, width = _parts(count, tiles.side), _parts(size, tiles.side)
    grid = (height + 1) // 2 * (width + 1) if job.symmetric else height * width
    best = torch.full((len(job.partner), count, SLOTS.value), NO_CANDIDATE.value, dtype=torch.int64, device=device)
    search[(grid,)](
        found.y, among.y, found.weights, among.weights, among.squares, found.origin, among.origin,
        torch.searchsorted(among.classes, found.classes, out_int32=True),
        torch.searchsorted(among.classes, found.classes, out_int32=True, right=True),
        best, count, size, among.y.shape[2], job.offset, INTRA=job.intra, INTER=job.inter, SYMMETRIC=job.symmetric,
        SIDE=tiles.side, CHANNELS=tiles.channels, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    choose[(count, len(job.partner))](
        best, found.order, job.features, job.keys, job.labels, job.partner, job.valid, count, dim,
        job.features.stride(0), job.keys.stride(0), FIRST_SIGN=job.intra or job.inter, SECOND_SIGN=job.inter,
        CHANNELS=DIRECT_CHANNELS, num_warps=4,
    )  # fmt: skip


def _look(x: Tensor, labels: Tensor, largest: Tensor) -> Tensor:
    """Which rows are finite and have a class [N] bool; their largest value goes into `largest`."""
    usable = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    grid = (_parts(x.shape[0], ROWS),)
    look[grid](x, labels, usable, largest, *x.shape, x.stride(0), ROWS=ROWS, CHANNELS=CHANNELS)
    return usable


def _in_order(x: Tensor, labels: Tensor, usable: Tensor, about: tuple[Tensor, ...], tiles: Tiles) -> _InOrder:
    length, width = _parts(x.shape[0], tiles.side) * tiles.side, _parts(x.shape[1], tiles.channels) * tiles.channels
    classes, order = labels.sort(stable=True)
    y = x.new_empty((length, 2, width), dtype=torch.float16)
    origin = torch.empty(length, dtype=torch.int32, device=x.device)
    weights, squares = torch.empty(2, length, dtype=torch.float32, device=x.device)
    lay_out[(_parts(length, ROWS),)](
        x, order, usable, *about, y, weights, squares, origin, *x.shape, x.stride(0), width,
        ROWS=ROWS, CHANNELS=CHANNELS, SAMPLE=SAMPLE, BULK=BULK,
    )  # fmt: skip
    return _InOrder(classes, order, origin, y, weights, squares)


def _with_adjacent_channels(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _parts(size: int, part: int) -> int:
    return -(-size // part)


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
