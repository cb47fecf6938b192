"""Backends behind `mine_pairs`: the same function under the same contract."""

import torch

from apinet_head.mining import plain
from apinet_head.mining.draw import draw
from apinet_head.mining.query import Backend, Found, Query, Search, finite_rows

# From so many rows on, "tiled" is quicker than "dense" for a batch searched in itself, by benchmarks/mining.py. Other
# devices are not measured yet: there the matrix of distances just may not get large (64 MiB in float32).
TILED_FROM = {"cpu": 1024}
TILED_FROM_ELSEWHERE = 4096


def _triton(query: Query) -> Found:
    """`triton.mine`, imported on first use: Triton is not available everywhere that PyTorch is."""
    try:
        from apinet_head.mining import triton
    except ImportError as error:
        raise ValueError(
            f"backend='triton' needs Triton, which cannot be imported ({error}): PyTorch for CUDA brings it on Linux; "
            "elsewhere, take backend='auto'"
        ) from error
    return triton.mine(query)


BACKENDS: dict[str, Backend] = {"dense": plain.mine_dense, "tiled": plain.mine_tiled, "triton": _triton}

__all__ = ["BACKENDS", "Backend", "Found", "Query", "Search", "choose", "find"]


def find(backend: str, query: Query, generator: torch.Generator | None) -> Found:
    """The results of all searches, those for a "random" partner included."""
    if backend == "auto":
        backend = choose(query.features.device.type, *query.shape)
    measured = tuple(search for search in query.searches if search.how != "random")
    if len(measured) == len(query.searches):
        return BACKENDS[backend](query)
    results = {}
    if measured:
        found = BACKENDS[backend](query._replace(searches=measured))
        results = {measured[0]: (found.partner[0], found.valid[0])}
    usable = finite_rows(query.rows) & (query.key_labels >= 0)
    for search in query.searches:
        if search.how == "random":
            results[search] = draw(query, usable, search.same_class, generator)
    partners, valids = zip(*(results[search] for search in query.searches), strict=True)
    return Found(torch.stack(partners), torch.stack(valids))


def choose(device_type: str, queries: int, keys: int) -> str:
    """The backend that "auto" means for so many queries and keys."""
    # Under compile or export sizes may be symbolic, and tiles are counted in Python.
    if torch.compiler.is_compiling():
        return "dense"
    rows = TILED_FROM.get(device_type, TILED_FROM_ELSEWHERE)
    return "tiled" if queries * keys >= rows**2 else "dense"
