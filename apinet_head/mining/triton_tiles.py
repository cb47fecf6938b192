"""Tile sizes for `triton_search`: for 9.0 the best of 36 tried on an H200 (benchmarks/tune_triton.py), else guesses."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """How a search is cut up: tiles of `side` rows and columns, `channels` at a time, and options of Triton's."""

    side: int
    channels: int
    warps: int
    stages: int


# By compute capability, for few pairs of rows and for many. 0 is Triton's interpreter, where small batches should have
# many tiles. It is a table because tuning at run time would measure within a CUDA graph, and differ from run to run.
TILES: dict[int, dict[str, Tiles]] = {
    0: {"few": Tiles(32, 64, 1, 1), "many": Tiles(32, 64, 1, 1)},
    80: {"few": Tiles(64, 32, 4, 4), "many": Tiles(128, 32, 8, 4)},
    86: {"few": Tiles(64, 32, 4, 3), "many": Tiles(128, 32, 8, 3)},
    89: {"few": Tiles(64, 32, 4, 3), "many": Tiles(128, 32, 8, 3)},
    90: {"few": Tiles(64, 64, 4, 3), "many": Tiles(128, 64, 8, 3)},
}
FEW = 2048 * 2048  # up to so many pairs of rows


def tiles_for(capability: int, pairs: int) -> Tiles:
    """The tiles for `pairs` pairs of rows; a GPU that is not in the table gets those of one with as little memory."""
    table = TILES.get(capability) or TILES[90 if 100 <= capability < 120 else 86]
    return table["few" if pairs <= FEW else "many"]
