"""Tile sizes for `triton_search`, by GPU: estimates, until `benchmarks/tune_triton.py` has measured them on one."""

from typing import NamedTuple


class Tiles(NamedTuple):
    """How a search is cut up: tiles of `side` rows and columns, `channels` at a time, and options of Triton's."""

    side: int
    channels: int
    warps: int
    stages: int


# By compute capability, then by what is searched: features as they are ("direct"), or rows in order of class, of
# float32 or of a half precision; few of them or many. 0 is Triton's interpreter, where small batches should have many
# tiles. It is a table because tuning at run time would measure within a CUDA graph, and not come out the same twice.
TILES: dict[int, dict[str, Tiles]] = {
    0: {
        "few direct": Tiles(16, 32, 1, 1), "few float32": Tiles(16, 32, 1, 1), "few half": Tiles(16, 32, 1, 1),
        "direct": Tiles(16, 32, 1, 1), "float32": Tiles(16, 32, 1, 1), "half": Tiles(16, 32, 1, 1),
    },
    80: {
        "few direct": Tiles(8, 512, 8, 1), "few float32": Tiles(64, 32, 4, 4), "few half": Tiles(64, 64, 4, 4),
        "direct": Tiles(16, 64, 8, 1), "float32": Tiles(128, 32, 8, 4), "half": Tiles(128, 64, 8, 4),
    },
    86: {
        "few direct": Tiles(8, 512, 8, 1), "few float32": Tiles(64, 32, 4, 3), "few half": Tiles(64, 64, 4, 3),
        "direct": Tiles(16, 64, 8, 1), "float32": Tiles(128, 32, 8, 3), "half": Tiles(128, 64, 8, 3),
    },
    89: {
        "few direct": Tiles(8, 512, 8, 1), "few float32": Tiles(64, 32, 4, 3), "few half": Tiles(64, 64, 4, 3),
        "direct": Tiles(16, 64, 8, 1), "float32": Tiles(128, 32, 8, 3), "half": Tiles(128, 64, 8, 3),
    },
    90: {
        "few direct": Tiles(8, 512, 8, 1), "few float32": Tiles(64, 64, 4, 3), "few half": Tiles(64, 64, 4, 4),
        "direct": Tiles(16, 64, 8, 1), "float32": Tiles(128, 64, 8, 3), "half": Tiles(128, 64, 8, 4),
    },
}  # fmt: skip
FEW = {"direct": 192 * 192, "float32": 2048 * 2048, "half": 2048 * 2048}  # up to so many pairs of rows


def tiles_for(capability: int, kind: str, pairs: int) -> Tiles:
    """The tiles for `pairs` pairs of rows; a GPU that is not in the table gets those of one with as little memory."""
    table = TILES.get(capability) or TILES[90 if 100 <= capability < 120 else 86]
    return table[f"few {kind}" if pairs <= FEW[kind] else kind]
