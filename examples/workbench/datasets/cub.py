"""CUB-200-2011: 200 classes of birds, with boxes and part locations."""

import re
from pathlib import Path

from workbench.datasets.bird_lists import IMAGES, BirdLists, read_paths
from workbench.datasets.common import Archive, ImageSet
from workbench.datasets.lists import check_ids, check_known, flag, read_lines

BOXES, PARTS, PART_PLACES = "bounding_boxes.txt", "parts/parts.txt", "parts/part_locs.txt"
CUB = Archive(
    "CUB-200-2011",
    expected="CUB_200_2011 or the folder it was unpacked in",
    images="images/",
    source="CUB-200-2011 is to be had from https://www.vision.caltech.edu/datasets/cub_200_2011/",
    folders=("CUB_200_2011",),
)


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


def read_boxes(root: str | Path) -> dict[int, tuple[float, float, float, float]]:
    """The bird's box in each image, {image_id: (x, y, width, height)} in pixels; root and errors as in `read_cub`."""
    root, images, boxes = CUB.find(root, IMAGES, BOXES)
    form = "<image_id> <x> <y> <width> <height>"
    found = read_lines(boxes, form, lambda image, x, y, w, h: (int(image), (float(x), float(y), float(w), float(h))))
    check_ids(images, read_paths(images, int), boxes, found)
    return found


def read_parts(root: str | Path) -> tuple[list[str], dict[int, dict[str, tuple[float, float]]]]:
    """The names of all parts by id, and {image_id: {part name: (x, y)}} in pixels, with the parts visible there.

    Every image is a key, even if none of its parts is visible. Root and errors are as in `read_cub`.
    """
    root, images, parts, part_places = CUB.find(root, IMAGES, PARTS, PART_PLACES)
    names = read_lines(parts, "<part_id> <part name>", lambda part, name: (int(part), name))
    form = "<image_id> <part_id> <x> <y> <visible>"
    places = read_lines(part_places, form, lambda i, p, x, y, v: ((int(i), int(p)), (flag(v), float(x), float(y))))
    check_ids(images, read_paths(images, int), part_places, (image for image, _ in places))
    check_ids(part_places, (part for _, part in places), parts, names, "part id")
    visible: dict[int, dict[str, tuple[float, float]]] = {}
    for (image_id, part_id), (seen, x, y) in sorted(places.items()):
        visible.setdefault(image_id, {}).update({names[part_id]: (x, y)} if seen else {})
    return [name for _, name in sorted(names.items())], visible


def family(class_name: str) -> str:
    """The last word of a class name: "001.Black_footed_Albatross" is an "Albatross"."""
    return re.split(r"[._ ]", class_name)[-1]
