"""Backends behind `mine_pairs`: the same function under the same contract."""

import functools
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor

from apinet_head.mining import plain
from apinet_head.mining.draw import draw
from apinet_head.mining.query import Backend, Found, Query, Search, finite_rows, is_exporting

# From so many rows on, "tiled" is quicker than "dense" on a CPU for a batch searched in itself. On an H200 the two are
# equally quick there, and the matrix of distances just may not get large (64 MiB in float32).
TILED_FROM = {"cpu": 1024}
TILED_FROM_ELSEWHERE = 4096
# Compute capabilities of the GPUs on which benchmarks/mining.py has found "triton" to be the quickest.
TRITON_ON = ((9, 0),)
HAS_TRITON = find_spec("triton") is not None


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
        backend = choose(query)
    measured = tuple(search for search in query.searches if search.how != "random")
    if measured == query.searches:
        return BACKENDS[backend](query)
    results = {}
    if measured:
        found = BACKENDS[backend](query._replace(searches=measured))
        results = {measured[0]: (found.partner[0], found.valid[0])}
    usable = finite_rows(query.rows()) & (query.key_labels >= 0)
    for search in query.searches:
        if search.how == "random":
            results[search] = draw(query, usable, search.same_class, generator)
    partners, valids = zip(*(results[search] for search in query.searches), strict=True)
    return Found(torch.stack(partners), torch.stack(valids))


def choose(query: Query) -> str:
    """The backend that "auto" means for this query."""
    if _suits_triton(query.features):
        return "triton"
    # Under compile or export sizes may be symbolic, and tiles are counted in Python.
    if torch.compiler.is_compiling():
        return "dense"
    queries, keys = query.shape()
    rows = TILED_FROM.get(query.features.device.type, TILED_FROM_ELSEWHERE)
    return "tiled" if queries * keys >= rows**2 else "dense"


def _suits_triton(features: Tensor) -> bool:
    # A CUDA tensor may be a fake one, on a machine without a GPU. An exported program should need no operator of ours.
    # An AMD GPU is a CUDA device, too, and MI200 is of capability 9.0.
    if not (HAS_TRITON and features.is_cuda and torch.cuda.is_available()) or torch.version.hip or is_exporting():
        return False
    if features.dtype == torch.float64 or (
        not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    ):
        return False
    properties = torch.cuda.get_device_properties(features.device)
    # The compiler needs a Triton that works anyway.
    return (properties.major, properties.minor) in TRITON_ON and (torch.compiler.is_compiling() or triton_works())


@functools.cache
def triton_works() -> bool:
    """Whether Triton can launch kernels: it needs a C compiler and Python's headers, which small images lack."""
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        warnings.warn(
            f"Triton does not work here, so pairs are mined in plain PyTorch, which takes longer: {error}",
            stacklevel=2,
        )
        return False
    return True
