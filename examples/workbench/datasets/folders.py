"""Any folder of class folders, or a CSV of path,label, as lists of labelled images that were looked at first."""

import csv
import hashlib
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from workbench.datasets.bad_images import find_bad, shown

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
TEST_NAMES = ("test", "val", "valid", "validation")
UNEVEN = 10  # times as many images in the largest class as in the smallest
NAMED = 5  # of many classes or files in a message


class Item(NamedTuple):
    path: Path
    label: str


class Split(NamedTuple):
    """Images to train with and to test with, and what a user should know about how they were found."""

    train: list[Item]
    test: list[Item]
    notes: list[str]


def read(source: Path, test_share: float = 0.25, seed: int = 0) -> Split:
    """Training and test images: those that the CSV or the folders train/ and test/ (or val/) give, or else split here.

    Raises:
        SystemExit: there are no such images; the message says what was looked for.
    """
    if source.is_file():
        train, test = read_csv(source)
        return Split(train, test, []) if test else _split(train, test_share, seed)
    if not source.is_dir():
        raise SystemExit(f"{source}: no such folder or CSV file")
    # A class may be called "train": it has images, where the split's folder has folders.
    if not _has_folders(source / "train"):
        return _split(read_folder(source), test_share, seed, _other_files(source))
    tests = [source / name for name in TEST_NAMES if _has_folders(source / name)]
    notes = [f"{left} is not used: the test images are those of {tests[0]}" for left in tests[1:]]
    notes += [note for folder in (source / "train", *tests[:1]) for note in _other_files(folder)]
    train = read_folder(source / "train")
    return Split(train, read_folder(tests[0]), notes) if tests else _split(train, test_share, seed, notes)


def read_folder(folder: Path) -> list[Item]:
    items = [
        Item(path, shown(each.name))  # names need not be text
        for each in sorted(folder.iterdir())
        if each.is_dir()
        for path in sorted(each.rglob("*"))
        if path.suffix.lower() in SUFFIXES and not _hidden(path.relative_to(folder))
    ]
    if not items:
        raise SystemExit(f"{folder}: no images in folders of classes, as in {folder / 'some_class' / 'image.jpg'}")
    return items


def read_csv(file: Path) -> tuple[list[Item], list[Item]]:
    """Rows of path,label and, if there is such a column, split; paths stay in the CSV's folder, whatever it says.

    A split says "train", or "test" or another of `TEST_NAMES`. Without the column, all are training images.
    """
    root = file.parent.resolve()
    train: list[Item] = []
    test: list[Item] = []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if not {"path", "label"} <= set(rows.fieldnames or ()):
            raise SystemExit(f"{file}: the first line must name the columns path and label, got {rows.fieldnames}")
        for row in rows:
            where, part = f"{file}, line {rows.line_num}", row.get("split", "train")
            if not row["path"] or not row["label"]:
                raise SystemExit(f"{where}: a path and a label are needed, got {row}")
            if part not in ("train", *TEST_NAMES):
                raise SystemExit(f"{where}: the split must be train or test, got {part!r}")
            (train if part == "train" else test).append(Item(_inside(root, row["path"], where), row["label"]))
    if not train:
        raise SystemExit(f"{file}: no {'training images' if test else 'rows'}")
    return train, test


def by_class(items: Iterable[Item]) -> dict[str, list[Item]]:
    classes = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    return dict(sorted(classes.items()))


def sound(split: Split, workers: int, skip_bad: bool) -> Split:
    """The split without images that can't be decoded; every one of them is tried, before hours of training.

    Raises:
        SystemExit: there are such images, and they are not to be skipped.
    """
    bad = dict(find_bad(sorted({item.path for item in split.train + split.test}), workers))
    for path, reason in bad.items():
        print(shown(f"bad image: {path} {reason}"))
    if bad and not skip_bad:
        raise SystemExit(f"{len(bad)} bad images: replace these files, or leave them out with --skip-bad")
    train, test = ([item for item in part if item.path not in bad] for part in (split.train, split.test))
    return Split(train, test, [*split.notes, *([f"{len(bad)} bad images are left out"] if bad else [])])


def warnings(train: list[Item], test: list[Item]) -> list[str]:
    """What is wrong with the data, but no reason to stop."""
    sizes = {name: len(members) for name, members in by_class(train).items()}
    found = [
        f"{_some(names)}: {what}"
        for names, what in (
            ([name for name in sizes if sizes[name] < 2], "one training image, nobody of its class to pair it with"),
            (sorted(set(sizes) - set(by_class(test))), "no test image, so that nothing is known of how it is told"),
        )
        if names
    ]
    if max(sizes.values()) >= UNEVEN * min(sizes.values()):
        largest, smallest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        found.append(
            f"the largest class, {largest}, has {sizes[largest]} training images, the smallest, {smallest}, has "
            f"{sizes[smallest]}: batches hold all classes alike, so that images of the smallest are repeated the most"
        )
    return found + _same_files(train, test)


def short_side(items: list[Item], seed: int = 0, count: int = 200) -> int:
    """The median of the images' shorter sides, of so many of them, by what their headers say."""
    chosen = random.Random(seed).sample(items, min(count, len(items)))
    sides = []
    for item in chosen:
        with PIL.Image.open(item.path) as image:
            sides.append(min(image.size))
    return round(statistics.median(sides))


def _split(items: list[Item], test_share: float, seed: int, notes: Iterable[str] = ()) -> Split:
    """The same share of each class for testing, at least one image where a class has two, drawn by seed."""
    rng = random.Random(seed)
    train: list[Item] = []
    test: list[Item] = []
    for members in by_class(items).values():
        members = sorted(members)
        rng.shuffle(members)
        count = min(len(members) - 1, max(1, round(test_share * len(members))))
        test += members[:count]
        train += members[count:]
    return Split(
        train, test, [*notes, f"{test_share:.0%} of each class are held out as test images, by the seed {seed}"]
    )


def _same_files(train: list[Item], test: list[Item]) -> list[str]:
    """Of files with the same content: those in training and test, and those of two classes."""
    digests = _digests({item.path for item in train + test})
    seen = {digests[item.path]: item.path for item in train if item.path in digests}
    leaks = [item.path for item in test if digests.get(item.path) in seen]
    found = [f"{path} of the test images is the training image {seen[digests[path]]}" for path in leaks[:NAMED]]
    if len(leaks) > NAMED:
        found.append(f"and so are {len(leaks) - NAMED} more test images: the accuracy will be too good")
    labels = defaultdict(set)
    for item in train + test:
        labels[digests.get(item.path, str(item.path))].add(item.label)
    torn = [sorted(names) for names in labels.values() if len(names) > 1]
    if torn:
        found.append(f"{len(torn)} images are there under two labels or more, as under {' and '.join(torn[0])}")
    return found


def _digests(paths: set[Path]) -> dict[Path, str]:
    """Of the files that are as long as another one; no others are read."""
    lengths = Counter(path.stat().st_size for path in paths)
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if lengths[path.stat().st_size] > 1}


def _inside(root: Path, given: str, where: str) -> Path:
    path = (root / given).resolve()
    if Path(given).is_absolute() or not path.is_relative_to(root):
        raise SystemExit(f"{where}: {given} leads out of the folder {root}")
    if not path.is_file():
        raise SystemExit(f"{where}: {given}: no such file")
    return path


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(each.is_dir() and not _hidden(Path(each.name)) for each in folder.iterdir())


def _hidden(path: Path) -> bool:
    """Left behind by systems and tools, beside the images: .ipynb_checkpoints, ._photo.jpg, __MACOSX."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _other_files(folder: Path) -> list[str]:
    names = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix.lower() not in SUFFIXES and not _hidden(path.relative_to(folder))
    ]
    return [f"{folder}: {len(names)} files are left aside, not named as images: {_some(names)}"] if names else []


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
