"""NABirds: 555 classes of birds, the leaves of a hierarchy; a family is the class above."""

from pathlib import Path

from workbench.datasets.bird_lists import BirdLists
from workbench.datasets.common import Archive, ImageSet
from workbench.datasets.lists import check_known, read_lines

HIERARCHY = "hierarchy.txt"
NABIRDS = Archive(
    "NABirds",
    expected="nabirds or the folder it was unpacked in",
    images="images/",
    source="NABirds is to be had from https://dl.allaboutbirds.org/nabirds",
    folders=("nabirds",),
)


def read_nabirds(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read NABirds; of its classes, those that have images, which are the hierarchy's leaves.

    Errors and `complete` are as in `read_cub`.

    `root` is the folder nabirds, or the one that it was unpacked in.
    """
    lists = BirdLists(NABIRDS, root, str, HIERARCHY)
    (hierarchy,) = lists.more
    form = "<class_id> <class_id of its parent>"
    parents = read_lines(hierarchy, form, lambda child, parent: (int(child), int(parent)))
    check_known(lists.labels, lists.used, hierarchy, parents, "class id")
    check_known(hierarchy, (parents[class_id] for class_id in lists.used), lists.classes, lists.names, "class id")
    family_of = {class_id: lists.names[parents[class_id]] for class_id in lists.used}
    return lists.image_set(family_of, complete=complete)
