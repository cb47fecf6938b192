"""CUB-200-2011 and NABirds: birds, in four lists that both have."""

import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from workbench.datasets.lists import Archive, ImageSet, Inside, check_ids, check_known, check_trained, flag, read_lines

IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
CUB = Archive(
    "CUB-200-2011",
    expected="CUB_200_2011 or the folder it was unpacked in",
    images="images/",
    source="CUB-200-2011 is available from https://www.vision.caltech.edu/datasets/cub_200_2011/",
    folders=("CUB_200_2011",),
)
HIERARCHY = "hierarchy.txt"
NABIRDS = Archive(
    "NABirds",
    expected="nabirds or the folder it was unpacked in",
    images="images/",
    source="NABirds is available from https://dl.allaboutbirds.org/nabirds",
    folders=("nabirds",),
)


class BirdLists:
    """The lists of images, their classes and parts of the split, and the names of classes, checked against each other.

    Args:
        image_id: what an image id is: int or str.
        more: further files that must be there; `self.more` has their paths.
    """

    def __init__(self, archive: Archive, root: str | Path, image_id: Callable[[str], Any], *more: str) -> None:
        found = archive.find(root, IMAGES, LABELS, SPLIT, CLASSES, *more)
        self.archive, self.image_id = archive, image_id
        self.root, self.images, self.labels, self.split, self.classes, *self.more = found
        inside = Inside(self.root, "images")
        form = "<image_id> <path under images/>"
        self.paths = read_lines(self.images, form, lambda image, path: (image_id(image), inside(path)))
        self.class_ids = self._read_images(self.labels, "<class_id>", int)
        self.in_train = self._read_images(self.split, "<is_training_image>", flag)
        self.names = read_lines(self.classes, "<class_id> <class_name>", lambda label, name: (int(label), name))
        check_ids(self.images, self.paths, self.labels, self.class_ids)
        check_ids(self.images, self.paths, self.split, self.in_train)
        check_known(self.labels, self.used, self.classes, self.names, "class id")

    def _read_images(self, file: Path, column: str, value: Callable[[str], Any]) -> dict[Any, Any]:
        return read_lines(file, f"<image_id> {column}", lambda image, text: (self.image_id(image), value(text)))

    @property
    def used(self) -> list[int]:
        """The ids of the classes that have images, in order."""
        return sorted(set(self.class_ids.values()))

    def image_set(self, families: Mapping[int, str], *, complete: bool) -> ImageSet:
        """The classes that have images, with {class id: family}, and their images in the order of image ids.

        If it is to be `complete`, missing images are an error.
        """
        trained = {self.class_ids[image_id] for image_id in self.paths if self.in_train[image_id]}
        check_trained(self.split, trained, self.classes, self.used, "class id")
        label_of = {class_id: label for label, class_id in enumerate(self.used)}
        rows = {image_id: (self.paths[image_id], label_of[self.class_ids[image_id]]) for image_id in self.paths}
        images = sorted(self.archive.images_at(self.root / "images", rows, self.images, complete=complete), key=_id)
        train, test = ([one for one in images if self.in_train[_id(one)] == part] for part in (True, False))
        names, groups = ([table[class_id] for class_id in label_of] for table in (self.names, families))
        return ImageSet(self.archive.name, names, train, test, groups)


_id = attrgetter("image_id")


def read_cub(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read the lists of CUB-200-2011, and check them against each other and the images on disk.

    `root` is the folder CUB_200_2011, or the one that it was unpacked in. Images come in the order of their ids.
    Without `complete`, images may be missing on the disk.

    Raises:
        FileNotFoundError: root, a list or images are missing.
        ValueError: a list is malformed, two don't fit together, or an image's path leaves root; the message names
            the files and the place.
    """
    lists = BirdLists(CUB, root, int)
    check_known(lists.classes, lists.names, lists.labels, lists.used, "class id")
    return lists.image_set({class_id: family(name) for class_id, name in lists.names.items()}, complete=complete)


def family(class_name: str) -> str:
    """The last word of a class name: "001.Black_footed_Albatross" is an "Albatross"."""
    return re.split(r"[._ ]", class_name)[-1]


def read_nabirds(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read NABirds; of its classes, those that have images, which are the hierarchy's leaves; else as `read_cub`."""
    lists = BirdLists(NABIRDS, root, str, HIERARCHY)
    (hierarchy,) = lists.more
    form = "<class_id> <class_id of its parent>"
    parents = read_lines(hierarchy, form, lambda child, parent: (int(child), int(parent)))
    check_known(lists.labels, lists.used, hierarchy, parents, "class id")
    check_known(hierarchy, (parents[class_id] for class_id in lists.used), lists.classes, lists.names, "class id")
    family_of = {class_id: lists.names[parents[class_id]] for class_id in lists.used}
    return lists.image_set(family_of, complete=complete)
