"""Backends behind `mine_pairs`: the same function under the same contract."""

from collections.abc import Sequence

import torch
from torch import Tensor

from apinet_head.mining import dense, tiled
from apinet_head.mining.contract import Backend, Found, Search


def _triton(
    features: Tensor,
    labels: Tensor,
    keys: Tensor | None,
    key_labels: Tensor,
    key_offset: int | None,
    searches: Sequence[Search],
    generator: torch.Generator | None,
) -> list[Found]:
    """`triton.mine`, imported on first use: Triton is not everywhere that PyTorch is."""
    try:
        from apinet_head.mining import triton
    except ImportError as error:
        raise ValueError(
            f"backend='triton' needs Triton, which cannot be imported ({error}): PyTorch for CUDA brings it on Linux; "
            "elsewhere, take backend='auto'"
        ) from error
    return triton.mine(features, labels, keys, key_labels, key_offset, searches, generator)


BACKENDS: dict[str, Backend] = {"dense": dense.mine, "tiled": tiled.mine, "triton": _triton}

__all__ = ["BACKENDS", "Backend", "Found", "Search"]
