"""Backends behind `mine_pairs`: the same function under the same contract."""

import torch

from apinet_head.mining import dense, tiled
from apinet_head.mining.contract import Backend, Found, Search

# From so many rows on, "tiled" is quicker than "dense" for a batch searched in itself, by benchmarks/mining.py. Other
# devices are not measured yet: there the matrix of distances just may not get large (64 MiB in float32).
TILED_FROM = {"cpu": 1024}
TILED_FROM_ELSEWHERE = 4096

BACKENDS: dict[str, Backend] = {"dense": dense.mine, "tiled": tiled.mine}

__all__ = ["BACKENDS", "Backend", "Found", "Search", "choose"]


def choose(device_type: str, queries: int, keys: int) -> str:
    """The backend that "auto" means for so many queries and keys."""
    # A graph in the making may leave the sizes open, and tiles are counted in Python.
    if torch.compiler.is_compiling():
        return "dense"
    rows = TILED_FROM.get(device_type, TILED_FROM_ELSEWHERE)
    return "tiled" if queries * keys >= rows**2 else "dense"
