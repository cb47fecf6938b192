"""Find the fastest tiles for mining backend "triton" on the GPU at hand, for the table in mining/triton_tiles.py.

    python benchmarks/tune_triton.py

Takes some minutes. Prints the lines to put into the table, with the time of a search as a CUDA graph.
"""

import itertools
from datetime import date

import torch
import triton
from tqdm import tqdm

from apinet_head.mining.triton import find_partners
from apinet_head.mining.triton_tiles import TILES, Tiles, tiles_for

SIZES, DIM = {"few": 1024, "many": 16384}, 2048  # batches that stand for all with the same entry
# All tiles worth a try; what doesn't fit a GPU fails there.
CANDIDATES = set(itertools.starmap(Tiles, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))))


def milliseconds(name: str, tiles: Tiles, capability: int) -> float:
    """Median time of a search with these tiles; infinite if they don't fit."""
    TILES[capability][name] = tiles
    size, device = SIZES[name], torch.device("cuda")
    features = torch.randn(size, DIM, generator=torch.Generator().manual_seed(0)).relu().to(device)
    labels = torch.arange(size, device=device) // 4
    try:
        return float(triton.testing.do_bench_cudagraph(
            lambda: find_partners(features, labels, None, labels, 0, 1, 1), return_mode="median"
        ))  # fmt: skip
    except (triton.CompilationError, triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("tune_triton.py needs a CUDA device, and finds none")
    capability = int("{}{}".format(*torch.cuda.get_device_capability()))
    TILES.setdefault(capability, {name: tiles_for(capability, SIZES[name] ** 2) for name in SIZES})
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
    print(f"{capability}: {{  # {device}, D={DIM}")
    for name, size in SIZES.items():
        today = TILES[capability][name]
        tried = {
            tiles: milliseconds(name, tiles, capability) for tiles in tqdm([today, *CANDIDATES - {today}], desc=name)
        }
        best = min(tried, key=lambda tiles: tried[tiles])
        TILES[capability][name] = best
        print(f'    "{name}": {best},  # {tried[best]:.3f} ms at B={size}, before {tried[today]:.3f}', flush=True)
    print("}")


if __name__ == "__main__":
    main()
