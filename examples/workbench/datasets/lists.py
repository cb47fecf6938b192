"""What readers return, and how they read and check a data set's lists; every error names the file and the line."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat

from workbench import counted

Parse = Callable[..., tuple[Any, Any]]


class Image(NamedTuple):
    """One image of a data set; ids are those of the files, or else paths."""

    path: Path
    label: int  # from 0, in the order of class ids
    image_id: int | str


@dataclass(frozen=True)
class ImageSet:
    """A data set with its official split; `classes` and `families` have the names by label.

    A family is a group of classes that look alike, such as all terns; `families` is empty where the files give none.
    `left_out` counts the bad images that a run skips.
    """

    name: str
    classes: list[str]
    train: list[Image]
    test: list[Image]
    families: list[str] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class Archive:
    """A data set as distributed by its authors; its files may be in the folder given, or in one of `folders` in it."""

    name: str
    expected: str  # the folder to give, in words
    source: str  # where to get it, as a sentence
    folders: tuple[str, ...] = ()
    images: str = "images/"  # the folders of its images, in words

    def find(self, root: str | Path, *files: str | tuple[str, ...]) -> tuple[Path, ...]:
        """The data set's folder, root or one of `folders` in it, and its files; a tuple is a choice of places."""
        choices = {names[0]: names for names in ((file,) if isinstance(file, str) else file for file in files)}
        found: dict[Path, dict[str, Path]] = {}
        for folder in (Path(root), *(Path(root) / name for name in self.folders)):
            places = {file: [folder / name for name in names] for file, names in choices.items()}
            found[folder] = {file: path for file, paths in places.items() for path in reversed(paths) if path.is_file()}
        # The folder with most of the files, so that a message about a missing one names the right place.
        root = max(found, key=lambda folder: len(found[folder]))
        if missing := [file for file in choices if file not in found[root]]:
            problem = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"{root} is not a folder"
            expected = f"expected {self.expected}, with {', '.join(choices)} and {self.images}"
            raise FileNotFoundError(f"{problem}; {expected}. {self.source}")
        return root, *found[root].values()

    def images_at(self, folder: Path, rows: Mapping[Any, Any], listing: Path, *, complete: bool) -> list[Image]:
        """The images of {image_id: (path in folder, label)}, as a listing has them; `complete`: all must be on disk."""
        paths = [path for path, _ in rows.values()] if complete else []
        # One listing per folder instead of a check per image: fast, and case-sensitive on macOS too.
        folders = {path.parent: folder / path.parent for path in paths}
        there = {parent: set(os.listdir(path)) if path.is_dir() else set() for parent, path in folders.items()}
        if missing := [str(path) for path in paths if path.name not in there[path.parent]]:
            lacking = f"{folder} lacks {some('image', missing)} of the {len(paths)} in {listing}"
            raise FileNotFoundError(f"{lacking} (upper and lower case count); unpack the archive again. {self.source}")
        return [Image(folder / path, label, image_id) for image_id, (path, label) in rows.items()]


def read_lines(file: Path, form: str, parse: Parse) -> dict[Any, Any]:
    """What `parse` makes of the columns of each line: (key, value).

    `form` shows a line, with each column in <>; the last column may contain spaces.
    """
    columns = form.count("<")
    # surrogateescape: file names need not be UTF-8, and are spelt like this in listings of folders too.
    lines = file.read_text("utf-8-sig", errors="surrogateescape").split("\n")
    rows = ((line, line.strip().split(maxsplit=columns - 1)) for line in lines)
    return _collect(file, "line", rows, columns, repr(form), parse)


def read_mat(file: Path, names: Sequence[str], parse: Parse, *, struct: str | None = None) -> dict[Any, Any]:
    """What `parse` makes of the entries of these variables, taken together, or of these fields of array `struct`."""
    try:
        loaded = loadmat(file, squeeze_me=True)
    except Exception as error:  # for a damaged file, SciPy may raise ValueError, TypeError, zlib.error, ...
        problem = f"{file} ({file.stat().st_size} bytes) is not a .mat file that SciPy can read: {error}"
        raise ValueError(f"{problem}; replace it") from error
    table, there = loaded, [name for name in loaded if not name.startswith("__")]
    if struct in there:
        table = loaded[struct]
        there = list(table.dtype.names or ()) if isinstance(table, np.ndarray) else []
    if missing := [name for name in names if name not in there]:
        inside = f" in {struct!r}" if struct else ""
        raise ValueError(f"{file} has no {', '.join(missing)}{inside}, only {', '.join(there) or 'none'}; replace it")
    columns = [np.atleast_1d(table[name]).tolist() for name in names]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"{file}: {', '.join(names)} have {', '.join(map(str, lengths))} entries; replace it")
    rows = ((row, row) for row in zip(*columns, strict=True))
    return _collect(file, "row", rows, len(names), f"({', '.join(names)})", parse)


def _collect(
    file: Path, kind: str, rows: Iterable[tuple[Any, Sequence[Any]]], columns: int, form: str, parse: Parse
) -> dict[Any, Any]:
    """{key: value} as `parse` gives them for each (text of the line, its fields)."""
    collected: dict[Any, Any] = {}
    for number, (text, fields) in enumerate(rows, 1):
        if not fields:
            continue
        try:
            if len(fields) < columns:
                raise ValueError(f"{len(fields)} of {columns} columns")
            key, value = parse(*fields)
            if key in collected:
                raise ValueError(f"id {key} was in an earlier {kind}")
        except (ValueError, OverflowError) as error:
            problem = f"{file}, {kind} {number}, {text!r}: {error}"
            raise ValueError(f"{problem}; expected {form}; unpack the archive again") from error
        collected[key] = value
    if not collected:
        raise ValueError(f"{file} is empty, expected {kind}s {form}; unpack the archive again")
    return collected


def flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"must be 0 or 1, not {text!r}")
    return text == "1"


def whole(value: Any) -> int:
    """An integer of a .mat file, where MATLAB often stores integers as doubles."""
    if not isinstance(value, Real) or value != int(value):
        raise ValueError(f"must be a whole number, not {value!r}")
    return int(value)


class Inside:
    """Takes the paths that a list gives to files in `folder` of the data set's folder `root`, if they stay in root.

    A path that leaves it, by its own text or by symbolic links on its way, is a ValueError. Links within root are fine,
    and root itself may be one.
    """

    def __init__(self, root: Path, folder: str) -> None:
        self.root, self.folder, self._real = root, folder, os.path.realpath(root)
        self._parents: dict[PurePosixPath, str] = {}  # resolved; cached, as resolving is slow

    def __call__(self, text: Any) -> PurePosixPath:
        if not isinstance(text, str):
            raise ValueError(f"must be a path, not {text!r}")
        windows = PureWindowsPath(text)  # knows both separators and drive letters
        if windows.anchor or ".." in windows.parts:
            raise ValueError(f"the path leaves {self.folder}/")
        if not windows.name:
            raise ValueError("the path is empty")
        path = PurePosixPath(text)
        if path.parent not in self._parents:
            self._parents[path.parent] = os.path.realpath(self.root / self.folder / path.parent)
        real = os.path.join(self._parents[path.parent], path.name)
        real = os.path.realpath(real) if os.path.islink(real) else real
        if not Path(real).is_relative_to(self._real):
            raise ValueError(f"the path leaves {self.root} by a link, to {real}; put the files there instead")
        return path


def check_ids(file: Path, ids: Iterable[Any], other: Path, other_ids: Iterable[Any], what: str = "image id") -> None:
    ids, other_ids = set(ids), set(other_ids)
    check_known(file, ids, other, other_ids, what)
    check_known(other, other_ids, file, ids, what)


def check_known(file: Path, ids: Iterable[Any], other: Path, other_ids: Iterable[Any], what: str = "image id") -> None:
    """The other list must have all ids of the one."""
    if unknown := set(ids) - set(other_ids):
        raise ValueError(f"{some(what, unknown)} of {file} not in {other}; unpack the archive again")


def check_apart(file: Path, ids: Iterable[Any], other: Path, other_ids: Iterable[Any], what: str = "image id") -> None:
    """No image may be for training and for testing."""
    if shared := set(ids) & set(other_ids):
        raise ValueError(f"{some(what, shared)} of {file} also in {other}; unpack the archive again")


def check_trained(split: Path, trained: Iterable[Any], names: Path, classes: Iterable[Any], what: str) -> None:
    """Every class must have training images."""
    if untrained := set(classes) - set(trained):
        lacking = f"{split} has no training images for {some(what, untrained)}"
        raise ValueError(f"{lacking}; each class of {names} needs at least one")


def some(what: str, items: Iterable[Any], shown: int = 5) -> str:
    """The count and the first few: "7 images (1, 2, 3, 4, 5, ...)"."""
    items = sorted(items)
    first = [*map(str, items[:shown]), *["..."] * (len(items) > shown)]
    return f"{counted(len(items), what)} ({', '.join(first)})"
