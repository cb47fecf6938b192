"""Backends behind `mine_pairs`: the same function under the same contract."""

from apinet_head.mining import dense, tiled
from apinet_head.mining.contract import Backend, Found, Search

BACKENDS: dict[str, Backend] = {"dense": dense.mine, "tiled": tiled.mine}

__all__ = ["BACKENDS", "Backend", "Found", "Search"]
