"""What all readers give, and how they find a data set's files and check that its images are there."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from workbench.datasets.lists import some


class Image(NamedTuple):
    """One image of a data set; `label` counts from 0 in the order of class ids, `image_id` is as in the files.

    Ids are numbers in CUB-200-2011, and text elsewhere: the path, where the files give an image no other id.
    """

    path: Path
    label: int
    image_id: int | str


@dataclass(frozen=True)
class ImageSet:
    """A data set with its official split; `classes` and `families` have the names by label.

    A family is a group of classes that look alike, such as all terns; `families` is empty where the files give none.
    `left_out` counts the images that a run does without, for they are bad.
    """

    name: str
    classes: list[str]
    train: list[Image]
    test: list[Image]
    families: list[str] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class Archive:
    """A data set as its makers hand it out.

    Attributes:
        expected: the folder to give, in words.
        folders: where its files may lie, seen from the folder given, if not in there.
        images: the folders of its images, in words.
        source: where to get it, as a sentence.
    """

    name: str
    expected: str
    images: str
    source: str
    folders: tuple[str, ...] = ()

    def find(self, root: str | Path, *files: str | tuple[str, ...]) -> tuple[Path, ...]:
        """The data set's folder, which is root or one of `folders` in it, and its files; a tuple is a choice of places.

        Raises:
            FileNotFoundError: files are missing; says which, and where to get the data set.
        """
        choices = {names[0]: names for names in ((file,) if isinstance(file, str) else file for file in files)}
        found: dict[Path, dict[str, Path]] = {}
        for folder in (Path(root), *(Path(root) / name for name in self.folders)):
            places = {file: [folder / name for name in names] for file, names in choices.items()}
            found[folder] = {file: path for file, paths in places.items() for path in reversed(paths) if path.is_file()}
        # The folder with the most of the files: when one is missing, the message is about the right place.
        root = max(found, key=lambda folder: len(found[folder]))
        missing = [file for file in choices if file not in found[root]]
        if missing:
            problem = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"{root} is no folder"
            expected = f"expected {self.expected}, with {', '.join(choices)} and {self.images}"
            raise FileNotFoundError(f"{problem}; {expected}. {self.source}")
        return root, *found[root].values()

    def check_images(self, folder: Path, paths: Iterable[PurePosixPath], listing: Path) -> None:
        """Raises FileNotFoundError if images of `listing`, at `paths` in `folder`, are not on disk."""
        paths = list(paths)
        # One listing per folder instead of a question per image: quick, and exact about case on macOS too. Only of the
        # folders that the list names: a walk through all of them would follow loops of links.
        listings: dict[PurePosixPath, set[str]] = {}

        def there(path: PurePosixPath) -> bool:
            parent = path.parent
            if parent == path:
                return True
            if parent not in listings:
                found = there(parent) and (folder / parent).is_dir()
                listings[parent] = set(os.listdir(folder / parent)) if found else set()
            return path.name in listings[parent]

        missing = [str(path) for path in paths if not there(path)]
        if missing:
            lacking = f"{folder} lacks {some('image', missing)} of the {len(paths)} in {listing}"
            raise FileNotFoundError(f"{lacking} (upper and lower case count); unpack the archive anew. {self.source}")


def images_at(folder: Path, rows: Mapping[int | str, tuple[PurePosixPath, int]]) -> list[Image]:
    """The images of {image_id: (path in folder, label)}."""
    return [Image(folder / path, label, image_id) for image_id, (path, label) in rows.items()]
