"""Find the fastest tiles for mining backend "triton" on the GPU at hand, for the table in mining/triton_tiles.py.

    python benchmarks/tune_triton.py

Takes some minutes, most of them to compile. Prints for every entry of the table the line to put there, with what it
took, and what today's entry takes. Times are those of a whole search, replayed as a CUDA graph.
"""

import argparse
import itertools
from collections.abc import Iterator
from datetime import date

import torch
import triton
from tqdm import tqdm

from apinet_head.mining.triton import find_partners
from apinet_head.mining.triton_tiles import TILES, Tiles, tiles_for

SIZES = {"few": 1024, "many": 16384}  # batches that stand for all with the same entry


def candidates() -> Iterator[Tiles]:
    """All tiles worth a try; what doesn't fit a GPU fails there."""
    yield from itertools.starmap(Tiles, itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))


def milliseconds(name: str, tiles: Tiles, capability: int, dim: int) -> float:
    """Median time of a search with these tiles; infinite if they don't fit."""
    TILES[capability][name] = tiles
    size, device = SIZES[name], torch.device("cuda")
    features = torch.randn(size, dim, generator=torch.Generator().manual_seed(0)).relu().to(device)
    labels = torch.arange(size, device=device) // 4
    try:
        return float(triton.testing.do_bench_cudagraph(
            lambda: find_partners(features, labels, None, labels, 0, 1, 1), return_mode="median"
        ))  # fmt: skip
    except (triton.CompilationError, triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="ENTRY")
    parser.add_argument("--dim", type=int, default=2048, metavar="D")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_triton.py needs a CUDA device, and finds none")
    major, minor = torch.cuda.get_device_capability()
    capability = major * 10 + minor
    TILES.setdefault(capability, {name: tiles_for(capability, SIZES[name] ** 2) for name in SIZES})
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {date.today()}"
    print(f"{capability}: {{  # {device}, D={options.dim}")
    for name in options.entries:
        today = TILES[capability][name]
        tried = {today: milliseconds(name, today, capability, options.dim)}
        for tiles in tqdm(set(candidates()) - {today}, desc=name, leave=False):
            tried[tiles] = milliseconds(name, tiles, capability, options.dim)
        best = min(tried, key=lambda tiles: tried[tiles])
        TILES[capability][name] = best
        print(
            f'    "{name}": {best},  # {tried[best]:.3f} ms at B={SIZES[name]}, before {tried[today]:.3f}', flush=True
        )
    print("}")


if __name__ == "__main__":
    main()
