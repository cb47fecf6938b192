"""Pair mining in fused Triton kernels, for CUDA: no matrix of distances in memory, few launches.

See `triton_search` for the formulas, and `plain` for the same in plain PyTorch. Memory beyond the features is a copy
of them in order of class, as large as in float32, and what the last comparison by subtraction takes.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from apinet_head._checks import describe
from apinet_head.mining import plain
from apinet_head.mining.exact import CLOSEST, best_of
from apinet_head.mining.query import Found, Query, Search, finite_rows
from apinet_head.mining.rows import bulk
from apinet_head.mining.triton_rows import lay_out
from apinet_head.mining.triton_search import NOBODY, search
from apinet_head.mining.triton_tiles import Tiles, tiles_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIGNS = {"similar": 1, "dissimilar": -1}
ROWS, CHANNELS = (16, 32) if INTERPRETED else (4, 512)  # what one program reads at a time; ROWS divides the tiles


def mine(query: Query) -> Found:
    """Search with the kernels, but for what plain PyTorch does in few operations, or in float64.

    Raises:
        ValueError: the features are not on a CUDA device, or on one that is too old.
    """
    features = query.features
    if not features.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs features on a CUDA device, got {describe(features)}: move them there, or take "
            "backend='auto'; to debug on a CPU, set the environment variable TRITON_INTERPRET=1 before Python starts"
        )
    if plain.is_small(query):
        return plain.mine_dense(query)
    if features.dtype == torch.float64:  # tensor cores are no place for it
        return plain.mine_tiled(query)
    signs = {asked.same_class: SIGNS[asked.how] for asked in query.searches}
    return Found(*find_partners(*query[:5], signs.get(True, 0), signs.get(False, 0)))


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
    names = {sign: how for how, sign in SIGNS.items()}
    searches = tuple(Search(names[sign], same) for sign, same in ((intra, True), (inter, False)) if sign)
    query = Query(features, labels, keys, key_labels, key_offset, searches)
    with _on(features.device):
        best, scale = _candidates(query, intra, inter)
        is_candidate = best != NOBODY.value
        partner = best_of(query, scale, best & 0xFFFFFFFF, is_candidate)
    return partner, is_candidate.any(2) & (labels >= 0)


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


def _candidates(query: Query, intra: int, inter: int) -> tuple[Tensor, Tensor]:
    """A few near candidates of each query, as `triton_search` packs them [searches,B,CLOSEST], and the rows' scale."""
    (count, size), device = query.shape, query.features.device
    tiles = tiles_for(_capability(device), count * size)
    usable = finite_rows(query.rows) & (query.key_labels >= 0)
    centre, scale = (value.float() for value in bulk(query.rows, usable))
    among = found = _in_order(query.rows, query.key_labels, usable, centre, scale, tiles)
    if query.keys is not None:
        usable = finite_rows(query.features) & (query.labels >= 0)
        found = _in_order(query.features, query.labels, usable, centre, scale, tiles)
    height, width = _parts(count, tiles.side), _parts(size, tiles.side)
    grid = (height + 1) // 2 * (width + 1) if query.keys is None else height * width
    best = torch.full((len(query.searches), count, CLOSEST), NOBODY.value, dtype=torch.int64, device=device)
    search[(grid,)](
        found.y, among.y, found.weights, among.weights, among.squares, found.origin, among.origin,
        torch.searchsorted(among.classes, found.classes, out_int32=True),
        torch.searchsorted(among.classes, found.classes, out_int32=True, right=True),
        best, count, size, among.y.shape[2], size if query.key_offset is None else query.key_offset,
        INTRA=intra, INTER=inter, SYMMETRIC=query.keys is None,
        SIDE=tiles.side, CHANNELS=tiles.channels, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return torch.empty_like(best).index_copy_(1, found.order, best), scale


def _in_order(x: Tensor, labels: Tensor, usable: Tensor, centre: Tensor, scale: Tensor, tiles: Tiles) -> _InOrder:
    x = x if x.stride(1) == 1 else x.contiguous()
    length, width = _parts(x.shape[0], tiles.side) * tiles.side, _parts(x.shape[1], tiles.channels) * tiles.channels
    classes, order = labels.sort(stable=True)
    y = x.new_empty((length, 2, width), dtype=torch.float16)
    origin = torch.empty(length, dtype=torch.int32, device=x.device)
    weights, squares = torch.empty(2, length, dtype=torch.float32, device=x.device)
    lay_out[(_parts(length, ROWS),)](
        x, order, usable, centre * scale, scale, y, weights, squares, origin, *x.shape, x.stride(0), width,
        ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return _InOrder(classes, order, origin, y, weights, squares)


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
