"""The four lists that CUB-200-2011 and NABirds have in common."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from workbench.datasets.common import Archive, Image, ImageSet
from workbench.datasets.lists import Inside, check_ids, check_known, check_trained, flag, read_lines

IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"


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
        self.paths = read_paths(self.images, image_id)
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
        folder = self.root / "images"
        if complete:
            self.archive.check_images(folder, self.paths.values(), self.images)
        label_of = {class_id: label for label, class_id in enumerate(self.used)}
        parts: dict[bool, list[Image]] = {True: [], False: []}
        for image_id, path in sorted(self.paths.items()):
            image = Image(folder / path, label_of[self.class_ids[image_id]], image_id)
            parts[self.in_train[image_id]].append(image)
        names, groups = ([table[class_id] for class_id in label_of] for table in (self.names, families))
        return ImageSet(self.archive.name, names, parts[True], parts[False], groups)


def read_paths(images: Path, image_id: Callable[[str], Any]) -> dict[Any, Any]:
    """{image_id: path in images/}."""
    inside = Inside(images.parent, "images")
    form = "<image_id> <path under images/>"
    return read_lines(images, form, lambda image, path: (image_id(image), inside(path)))
