"""Check a data set before training: decode every image of its lists as training does, and list the bad ones.

python examples/cub/check.py CUB_200_2011
python examples/cub/check.py stanford_cars --dataset cars --output bad_cars.txt
python -m examples.cub.check CUB_200_2011          # the same, from the root of the checkout

The list of bad images, with reasons, is what `train.py --skip-bad` takes. Exits with 1 if an image is bad, or the data
set's own lists are. What is accepted is in image_files.py.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

if __package__:  # started with -m: its neighbours are imported by plain name
    sys.path.insert(0, str(Path(__file__).parent))

# Nothing here imports torch: a check should start at once, and so should its processes.
from bad_images import LIST, shown, write_list
from image_files import why_bad
from readers import ARCHIVES, READERS
from tqdm import tqdm

CHUNK = 8  # images given to a process at a time


def find_bad(paths: list[Path], workers: int) -> list[tuple[Path, str]]:
    """The bad ones of the files with the reasons, in order; with 0 workers, without processes beside this one.

    Raises:
        SystemExit: a process died, of a decoder's crash or for want of memory.
    """
    bad: list[tuple[Path, str]] = []
    with tqdm(total=len(paths), unit=" images") as bar, ProcessPoolExecutor(max(1, workers)) as pool:
        reasons = pool.map(why_bad, paths, chunksize=CHUNK) if workers else map(why_bad, paths)
        try:
            for path, reason in zip(paths, reasons, strict=True):
                bad += [(path, reason)] if reason else []
                bar.update()
        except BrokenProcessPool:
            suspects = paths[bar.n : bar.n + CHUNK * workers]
            raise SystemExit(
                f"a process died while decoding one of the {len(suspects)} images from {shown(str(suspects[0]))} to "
                f"{shown(str(suspects[-1]))}: for want of memory (take fewer --workers), or by a fault in a decoder"
            ) from None
    return bad


def main(arguments: list[str] | None = None) -> list[tuple[Path, str]]:
    """The bad images with the reasons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set, as for train.py --data")
    parser.add_argument("--dataset", choices=ARCHIVES, default="cub", help="which it is (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=LIST, metavar="FILE", help="the list (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=processors(), help="processes (default: %(default)s); 0: none")
    options = parser.parse_args(arguments)
    if options.workers < 0:
        parser.error(f"--workers must be at least 0, got {options.workers}")

    try:
        data = READERS[options.dataset](options.data, complete=False)
    except (OSError, ValueError) as error:
        raise SystemExit(shown(str(error))) from None
    images = [image.path for image in data.train + data.test]
    bad = find_bad(images, options.workers)
    write_list(Path(options.output), options.data, bad)
    for path, reason in bad:
        print(shown(f"{path}: {reason}"))
    print(f"{len(images)} images of {data.name}, {len(bad)} bad; the list is {options.output}")
    return bad


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(bool(main()))
