"""Reads any folder of class folders, or a CSV of path,label, and checks its images."""

import codecs
import csv
import hashlib
import io
import random
import statistics
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from workbench import counted, listed, shown
from workbench.datasets.bad_images import find_bad
from workbench.datasets.lists import Image, ImageSet

SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")  # in this order, in any case
UNEVEN = 10  # times as many images in the largest class as in the smallest
NAMED = 5  # of many files in a message


class Item(NamedTuple):
    path: Path
    label: str


class Split(NamedTuple):
    """Training and test images, and notes for the user on how they were found."""

    train: list[Item]
    test: list[Item]
    notes: list[str]

    def as_image_set(self, name: str) -> ImageSet:
        """With numbers for labels, in the order of the classes' names; each class has training images."""
        classes = list(by_class(self.train))
        rows = {label: row for row, label in enumerate(classes)}
        train, test = ([Image(item.path, rows[item.label], str(item.path)) for item in part] for part in self[:2])
        return ImageSet(name, classes, train, test)


def read(source: Path, test_share: float = 0.25, seed: int = 0) -> Split:
    """Training and test images: those that the CSV or the folders train/ and test/ (or val/) give, or else split here.

    Names of classes that differ in case or spaces are one class, and so are train/, Train/ and training/.
    """
    if source.is_file():
        train, test, notes = read_csv(source)
    elif source.is_dir():
        train, test, notes = _read_parts(source)
    else:
        raise SystemExit(f"{source}: no such folder or CSV file")
    names, more = _one_spelling(item.label for item in train + test)
    train, test = ([item._replace(label=names[item.label]) for item in part] for part in (train, test))
    notes += more
    if not test:
        train, test = _split(train, test_share, seed)
        notes.append(f"{test_share:.0%} of each class are held out as test images, by the seed {seed}")
    return Split(train, test, notes)


def _read_parts(source: Path) -> Split:
    """Of a folder: train/ and test/, or all as training images."""
    # A class may be called "train": it has images, where the split's folder has folders.
    folders = sorted(path for path in source.iterdir() if path.name.lower() in TRAIN_NAMES + TEST_NAMES)
    folders = [path for path in folders if _class_folders(path)]
    trains, tests = (
        [path for name in names for path in folders if path.name.lower() == name] for names in (TRAIN_NAMES, TEST_NAMES)
    )
    if not trains and not tests:
        return Split(read_folder(source), [], _other_files(source))
    if len(trains) != 1:
        found = ", ".join(path.name for path in trains or tests)
        raise SystemExit(f"{source}: of a split, one folder of training images is needed, train/; it has {found}")
    notes = [f"{left} is not used: the test images are those of {tests[0]}" for left in tests[1:]]
    notes += [note for folder in (*trains, *tests[:1]) for note in _other_files(folder)]
    return Split(read_folder(trains[0]), read_folder(tests[0]) if tests else [], notes)


def _one_spelling(labels: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """{label: how its class is spelt}, the most frequent spelling; with a note for classes that have several."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for label in labels:
        spellings[unicodedata.normalize("NFC", " ".join(label.split())).casefold()][label] += 1
    names, notes = {}, []
    for counts in spellings.values():
        best = " ".join(max(counts, key=lambda label: (counts[label], label)).split())
        names |= dict.fromkeys(counts, best)
        if len(counts) > 1:
            notes.append(f"the class {best} is spelt in several ways: {', '.join(map(repr, sorted(counts)))}")
    return names, notes


def read_folder(folder: Path) -> list[Item]:
    # Names need not be text.
    items = [Item(path, shown(each.name)) for each in _class_folders(folder) for path in images_below(each)]
    if not items:
        raise SystemExit(f"{folder}: no images in folders of classes, as in {folder / 'some_class' / 'image.jpg'}")
    return items


def images_below(folder: Path) -> list[Path]:
    """What is named as an image in a folder and those in it, sorted; hidden files are not."""
    return [path for path in _visible(folder, folder.rglob("*")) if path.suffix.lower() in SUFFIXES]


def read_csv(file: Path) -> Split:
    """Rows of path,label and, if there is such a column, split; paths stay in the CSV's folder, whatever it says.

    A split says "train", or "test" or another of `TEST_NAMES`. Without the column, all are training images. Columns may
    also be separated by semicolons or tabs, as Excel does it, which writes UTF-16 and Windows' own encoding, too.
    """
    root, (text, notes) = file.parent.resolve(), _text(file)
    header, _, rest = text.partition("\n")
    delimiter = max(",;\t", key=header.count)
    columns = [name.strip().lower() for name in next(csv.reader([header.strip("\r")], delimiter=delimiter), [])]
    if not {"path", "label"} <= set(columns):
        raise SystemExit(f"{file}: the first line must name the columns path and label, got {shown(str(columns))}")
    parts: dict[bool, list[Item]] = {True: [], False: []}
    rows = csv.DictReader(io.StringIO(rest, newline=""), columns, delimiter=delimiter)
    try:
        for given in rows:
            row = {name: value.strip() for name, value in given.items() if isinstance(value, str)}
            where, part = f"{file}, line {rows.line_num + 1}", (row.get("split") or "train").lower()
            if not row.get("path") or not row.get("label"):
                raise SystemExit(f"{where}: a path and a label are needed, got {shown(str(row))}")
            if part not in (*TRAIN_NAMES, *TEST_NAMES):
                raise SystemExit(f"{where}: the split must be train or test, got {part!r}")
            path = (root / row["path"]).resolve()
            if not path.is_relative_to(root):
                advice = "put the CSV in the folder of the images"
                raise SystemExit(f"{where}: {row['path']} leads out of the folder {root}: {advice}")
            if not path.is_file():
                raise SystemExit(f"{where}: {row['path']}: no such file")
            parts[part in TRAIN_NAMES].append(Item(path, row["label"]))
    except csv.Error as error:
        raise SystemExit(f"{file}, line {rows.line_num + 1}: {error}") from None
    if not parts[True]:
        raise SystemExit(f"{file}: no {'training images' if parts[False] else 'rows'}")
    return Split(parts[True], parts[False], notes)


def _text(file: Path) -> tuple[str, list[str]]:
    """What is in a file, by its byte order mark, as UTF-8, or else as Windows' Western encoding, with a note."""
    content = file.read_bytes()
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return content.decode("utf-16", errors="replace"), []
    try:
        text, notes = content.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
        notes = [f"{file} is not UTF-8 and was read as Windows-1252: check the names"]
    if "\0" in text:
        raise SystemExit(f"{file}: not text in a supported encoding: save it as UTF-8")
    return text, notes


def by_class(items: Iterable[Item]) -> dict[str, list[Item]]:
    classes = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    return dict(sorted(classes.items()))


def sound(split: Split, workers: int, skip_bad: bool) -> Split:
    """The split without images that can't be decoded; all are tried before training starts."""
    bad = dict(find_bad(sorted({item.path for item in split.train + split.test}), workers))
    for path, reason in bad.items():
        print(shown(f"bad image: {path} {reason}"))
    if bad and not skip_bad:
        raise SystemExit(f"{counted(len(bad), 'bad image')}: replace them, or leave them out with --skip-bad")
    train, test = ([item for item in part if item.path not in bad] for part in (split.train, split.test))
    left_out = [f"left out: {counted(len(bad), 'bad image')}"] if bad else []
    return Split(train, test, split.notes + left_out)


def warnings(train: list[Item], test: list[Item]) -> list[str]:
    """What the user should know about the data, but is no reason to stop."""
    sizes = {name: len(members) for name, members in by_class(train).items()}
    found = []
    if alone := [name for name in sizes if sizes[name] < 2]:
        found.append(f"{listed(alone)}: only one training image, so it has no partner of its class")
    if untested := sorted(set(sizes) - set(by_class(test))):
        found.append(f"{listed(untested)}: no test images, so its accuracy is unknown")
    if max(sizes.values()) >= UNEVEN * min(sizes.values()):
        largest, smallest = max(sizes, key=sizes.__getitem__), min(sizes, key=sizes.__getitem__)
        found.append(
            f"the largest class, {largest}, has {sizes[largest]} training images, the smallest, {smallest}, has "
            f"{sizes[smallest]}: batches contain all classes equally often, so images of the smallest are repeated most"
        )
    return found + _same_files(train, test)


def short_side(paths: list[Path]) -> int:
    """The median of the images' shorter sides, of 200 of them, by what their headers say."""
    sides = []
    for path in random.Random(0).sample(paths, min(200, len(paths))):
        with PIL.Image.open(path) as image:
            sides.append(min(image.size))
    return round(statistics.median(sides))


def _split(items: list[Item], test_share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """The same share of each class for testing, at least one image where a class has two, drawn by seed."""
    rng, train, test = random.Random(seed), [], []
    for members in by_class(items).values():
        members = sorted(members)
        rng.shuffle(members)
        count = min(len(members) - 1, max(1, round(test_share * len(members))))
        test += members[:count]
        train += members[count:]
    return train, test


def _same_files(train: list[Item], test: list[Item]) -> list[str]:
    """Of files with the same content: those in training and test, and those of two classes."""
    sizes = {path: path.stat().st_size for path in {item.path for item in train + test}}
    lengths = Counter(sizes.values())
    # Files of a length of their own are not read.
    alike = [path for path, size in sizes.items() if lengths[size] > 1]
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in alike}
    content = {path: digests.get(path, str(path)) for path in sizes}
    seen = {content[item.path]: item.path for item in train}
    leaks = [item.path for item in test if content[item.path] in seen]
    found = [f"{path} of the test images is the training image {seen[content[path]]}" for path in leaks[:NAMED]]
    if len(leaks) > NAMED:
        more = counted(len(leaks) - NAMED, "more test image")
        found.append(f"the same holds for {more}: the accuracy will be too good")
    labels = defaultdict(set)
    for item in train + test:
        labels[content[item.path]].add(item.label)
    torn = [sorted(names) for names in labels.values() if len(names) > 1]
    if torn:
        found.append(f"under two labels or more, as under {' and '.join(torn[0])}: {counted(len(torn), 'image')}")
    return found


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder, folder.iterdir()) if path.is_dir()] if folder.is_dir() else []


def _visible(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Without what systems and tools leave beside the images: .ipynb_checkpoints, ._photo.jpg, __MACOSX."""

    def hidden(path: Path) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)

    return sorted(path for path in paths if not hidden(path))


def _other_files(folder: Path) -> list[str]:
    files = [path for path in _visible(folder, folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files if path.suffix.lower() not in SUFFIXES]
    left = f"{folder}: {counted(len(names), 'file')} ignored, not named as images: {listed(names)}"
    return [left] if names else []
