"""CUB-200-2011 and NABirds: birds, in four lists that both have."""

import re
from operator import attrgetter
from pathlib import Path

from workbench.datasets.lists import Archive, ImageSet, Inside, check_ids, check_known, check_trained, flag, read_lines

IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
CUB = Archive(
    "CUB-200-2011",
    expected="CUB_200_2011 or the folder it was unpacked in",
    source="CUB-200-2011 is available from https://www.vision.caltech.edu/datasets/cub_200_2011/",
    folders=("CUB_200_2011",),
)
HIERARCHY = "hierarchy.txt"
NABIRDS = Archive(
    "NABirds",
    expected="nabirds or the folder it was unpacked in",
    source="NABirds is available from https://dl.allaboutbirds.org/nabirds",
    folders=("nabirds",),
)


def read_cub(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read the lists of CUB-200-2011, and check them against each other and the images on disk.

    `root` is the folder CUB_200_2011, or the one that it was unpacked in. Images come in the order of ids, and may
    be missing without `complete`. All else that is missing is a FileNotFoundError; a malformed list, lists that don't
    fit together, and paths that leave root are a ValueError, which names the files and the place.
    """
    return _read(CUB, root, int, complete=complete)


def read_nabirds(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read NABirds; of its classes, those that have images, which are the hierarchy's leaves; else as `read_cub`."""
    return _read(NABIRDS, root, str, HIERARCHY, complete=complete)


def family(class_name: str) -> str:
    """The last word of a class name: "001.Black_footed_Albatross" is an "Albatross"."""
    return re.split(r"[._ ]", class_name)[-1]


def _read(archive: Archive, root: str | Path, kind: type, *more: str, complete: bool) -> ImageSet:
    """What the four lists hold; `kind` is what an image id is, and `more` the hierarchy, if there is one."""
    root, images, labels, split, classes, *hierarchy = archive.find(root, IMAGES, LABELS, SPLIT, CLASSES, *more)
    inside = Inside(root, "images")
    paths = read_lines(images, "<image_id> <path under images/>", lambda image, path: (kind(image), inside(path)))
    class_ids = read_lines(labels, "<image_id> <class_id>", lambda image, label: (kind(image), int(label)))
    in_train = read_lines(split, "<image_id> <is_training_image>", lambda image, text: (kind(image), flag(text)))
    names = read_lines(classes, "<class_id> <class_name>", lambda label, name: (int(label), name))
    used = sorted(set(class_ids.values()))
    check_ids(images, paths, labels, class_ids)
    check_ids(images, paths, split, in_train)
    check_known(labels, used, classes, names, "class id")
    if hierarchy:
        form = "<class_id> <class_id of its parent>"
        parents = read_lines(hierarchy[0], form, lambda child, parent: (int(child), int(parent)))
        check_known(labels, used, hierarchy[0], parents, "class id")
        check_known(hierarchy[0], (parents[class_id] for class_id in used), classes, names, "class id")
        families = [names[parents[class_id]] for class_id in used]
    else:
        check_known(classes, names, labels, used, "class id")
        families = [family(names[class_id]) for class_id in used]
    check_trained(split, {class_ids[image] for image in paths if in_train[image]}, classes, used, "class id")
    label_of = {class_id: label for label, class_id in enumerate(used)}
    rows = {image: (path, label_of[class_ids[image]]) for image, path in paths.items()}
    found = sorted(archive.images_at(root / "images", rows, images, complete=complete), key=attrgetter("image_id"))
    train, test = ([image for image in found if in_train[image.image_id] is part] for part in (True, False))
    return ImageSet(archive.name, [names[class_id] for class_id in used], train, test, families)
