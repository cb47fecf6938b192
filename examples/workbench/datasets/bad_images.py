"""Bad images: found before training, listed by check_images.py, left out by runs with --skip-bad.

The list has a line per image: its path relative to the data folder, a tab, and the reason.
torch is not imported here, so that a check and its worker processes start quickly.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from workbench import shown
from workbench.datasets.lists import ImageSet, some
from workbench.image_files import ADVICE, BadImageError, load_image

LIST = "bad_images.txt"
CHUNK = 8  # images given to a process at a time
UTF8 = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # file names may not be valid UTF-8


def why_bad(path: Path) -> str | None:
    """The reason for which `load_image` refuses a file, None if it takes it."""
    try:
        load_image(path)
    except BadImageError as error:
        return str(error).removeprefix(f"{path} ").removesuffix(ADVICE)
    return None


def find_bad(paths: list[Path], workers: int) -> list[tuple[Path, str]]:
    """The files that are bad, with the reasons, in order; 0 workers: in this process."""
    bad: list[tuple[Path, str]] = []
    with tqdm(total=len(paths), unit=" images") as bar, ProcessPoolExecutor(max(1, workers)) as pool:
        reasons = pool.map(why_bad, paths, chunksize=CHUNK) if workers else map(why_bad, paths)
        try:
            for path, reason in zip(paths, reasons, strict=True):
                bad += [(path, reason)] if reason else []
                bar.update()
        except BrokenProcessPool:
            suspects = [shown(str(path)) for path in paths[bar.n : bar.n + CHUNK * workers]]
            where = f"one of the {len(suspects)} images from {suspects[0]} to {suspects[-1]}"
            why = "it ran out of memory (use fewer --workers), or a decoder crashed"
            raise SystemExit(f"a process died while decoding {where}: {why}") from None
    return bad


def write_list(file: Path, root: Path, bad: Iterable[tuple[Path, str]]) -> None:
    with file.open("w", **UTF8) as opened:
        # The csv module quotes names with tabs or line ends.
        rows = ((os.path.relpath(path, root), reason) for path, reason in bad)
        csv.writer(opened, delimiter="\t", lineterminator="\n").writerows(rows)


def read_list(file: Path, root: Path) -> dict[str, int]:
    """{absolute path: its line}."""
    try:
        with file.open(**UTF8) as opened:
            rows = csv.reader(opened, delimiter="\t")
            return {os.path.abspath(root / row[0]): rows.line_num for row in rows if row}
    except (OSError, csv.Error) as error:
        raise SystemExit(f"--skip-bad: the list {file} cannot be read: {error}; check_images.py writes it") from None


def leave_out(data: ImageSet, file: Path, root: Path, n_samples: int) -> ImageSet:
    """The data set without the images of the list; prints their number, and the classes that have few images left."""
    listed = read_list(file, root)
    paths = {os.path.abspath(image.path) for image in data.train + data.test}
    for path, line in listed.items():
        if path not in paths:
            problem = f"{shown(path)} is not an image of {root}; recreate the list with check_images.py"
            raise SystemExit(f"{file}, line {line}: {problem}")
    parts = (data.train, data.test)
    train, test = ([image for image in part if os.path.abspath(image.path) not in listed] for part in parts)
    if missing := [str(image.path) for image in train + test if not os.path.lexists(image.path)]:
        missing = shown(some("image", missing))
        raise SystemExit(f"{missing} missing and not in {file}; recreate it with check_images.py")
    before, left = Counter(image.label for image in data.train), Counter(image.label for image in train)
    gone = [data.classes[label] for label in before if not left[label]]
    if gone or not test:
        lacking = f"training images for {some('class', gone)}" if gone else "test images"
        raise SystemExit(f"without the bad images of {file}, {root} has no {lacking}: replace some of them")
    counts = [len(data.train) - len(train), len(data.test) - len(test)]
    print(f"{sum(counts)} bad images left out: {counts[0]} of training, {counts[1]} of testing ({file})", flush=True)
    for label, number in sorted(left.items()):
        if number < min(before[label], n_samples):
            what = "pairs the image with itself" if number == 1 else "repeats images"
            few = f"{data.classes[label]} has {number} of {before[label]} training images left"
            print(f"warning: {few}: a batch, with {n_samples} of it, {what}", flush=True)
    return replace(data, train=train, test=test, left_out=sum(counts))


@contextmanager
def ending_at_bad_images() -> Iterator[None]:
    """Turns a bad image into a one-line error with its path and what to do."""
    try:
        yield
    except BadImageError as error:
        # From a worker of a DataLoader, the message has the worker's traceback before it.
        message = str(error).strip().rpartition(f"{BadImageError.__name__}: ")[2]
        advice = "check_images.py finds all bad images before training; with its list, --skip-bad leaves them out."
        raise SystemExit(f"\nbad image: {message}.\n{advice}") from None
