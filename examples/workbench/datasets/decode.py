"""Tries all images of a data set before training, on all processors; without torch, so that it starts at once."""

import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from workbench.datasets.bad_images import shown
from workbench.image_files import ADVICE, BadImageError, load_image

CHUNK = 8  # images given to a process at a time


def why_bad(path: Path) -> str | None:
    """The reason for which `load_image` refuses a file, None if it takes it."""
    try:
        load_image(path)
    except BadImageError as error:
        return str(error).removeprefix(f"{path} ").removesuffix(ADVICE)
    return None


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


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
