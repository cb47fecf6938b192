"""Backends behind `mine_pairs`: the same function under the same contract."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining import dense, tiled
from apinet_head.mining.contract import Backend, Found, Search
from apinet_head.mining.draw import draw
from apinet_head.mining.rows import finite_rows

# From so many rows on, "tiled" is quicker than "dense" for a batch searched in itself, by benchmarks/mining.py. Other
# devices are not measured yet: there the matrix of distances just may not get large (64 MiB in float32).
TILED_FROM = {"cpu": 1024}
TILED_FROM_ELSEWHERE = 4096


def _triton(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
) -> Found:
    """`triton.mine`, imported on first use: Triton is not everywhere that PyTorch is."""
    try:
        from apinet_head.mining import triton
    except ImportError as error:
        raise ValueError(
            f"backend='triton' needs Triton, which cannot be imported ({error}): PyTorch for CUDA brings it on Linux; "
            "elsewhere, take backend='auto'"
        ) from error
    return triton.mine(features, labels, keys, key_labels, key_offset, searches)


BACKENDS: dict[str, Backend] = {"dense": dense.mine, "tiled": tiled.mine, "triton": _triton}

__all__ = ["BACKENDS", "Backend", "Found", "Search", "choose", "find"]


def find(
    backend: str,
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
    generator: torch.Generator | None,
) -> Found:
    """The results of all searches, those for a "random" partner included; see `Backend` for the arguments."""
    if backend == "auto":
        backend = choose(features.device.type, labels.shape[0], key_labels.shape[0])
    measured = [search for search in searches if search.how != "random"]
    found = {}
    if measured:
        result = BACKENDS[backend](features, labels, keys, key_labels, key_offset, measured)
        if len(measured) == len(searches):
            return result
        found = {measured[0]: (result.partner[0], result.valid[0])}
    finite = finite_rows(features if keys is None else keys)
    for search in searches:
        if search.how == "random":
            found[search] = draw(finite, labels, key_labels, key_offset, search.same_class, generator)
    partners, valids = zip(*(found[search] for search in searches), strict=True)
    return Found(torch.stack(partners), torch.stack(valids))


def choose(device_type: str, queries: int, keys: int) -> str:
    """The backend that "auto" means for so many queries and keys."""
    # A graph in the making may leave the sizes open, and tiles are counted in Python.
    if torch.compiler.is_compiling():
        return "dense"
    rows = TILED_FROM.get(device_type, TILED_FROM_ELSEWHERE)
    return "tiled" if queries * keys >= rows**2 else "dense"
