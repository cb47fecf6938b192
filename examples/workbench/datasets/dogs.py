"""Stanford Dogs: 120 breeds; the files give no families."""

from pathlib import Path
from typing import Any

from workbench.datasets.common import Archive, ImageSet, images_at
from workbench.datasets.lists import Inside, check_apart, check_trained, read_mat, whole

TRAIN, TEST = ("train_list.mat", "lists/train_list.mat"), ("test_list.mat", "lists/test_list.mat")
DOGS = Archive(
    "Stanford Dogs",
    expected="the folder that images.tar and lists.tar were unpacked in",
    images="Images/",
    source="Stanford Dogs is to be had from http://vision.stanford.edu/aditya86/ImageNetDogs/",
)


def read_dogs(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read Stanford Dogs; a class is called like its folder. Errors and `complete` as in `read_cub`.

    The lists may lie in a folder lists/. Images come in the order of the lists, classes in that of their numbers.
    """
    root, train, test = DOGS.find(root, TRAIN, TEST)
    folder_of: dict[int, str] = {}
    class_of: dict[str, int] = {}
    inside = Inside(root, "Images")

    def parse(name: Any, class_id: Any) -> tuple[str, Any]:
        path, class_id = inside(name), whole(class_id)
        folder = str(path.parent)
        if folder_of.setdefault(class_id, folder) != folder:
            raise ValueError(f"class {class_id} was in {folder_of[class_id]} before")
        if class_of.setdefault(folder, class_id) != class_id:
            raise ValueError(f"{folder} had class {class_of[folder]} before")
        return str(path), (path, class_id)

    parts = []
    for listing in (train, test):
        rows = read_mat(listing, ["file_list", "labels"], parse)
        if complete:
            DOGS.check_images(root / "Images", [path for path, _ in rows.values()], listing)
        parts.append(rows)
    check_apart(train, parts[0], test, parts[1], "image")
    check_trained(train, (class_id for _, class_id in parts[0].values()), test, folder_of, "class label")
    label_of = {class_id: label for label, class_id in enumerate(sorted(folder_of))}
    images = [
        images_at(root / "Images", {key: (path, label_of[class_id]) for key, (path, class_id) in rows.items()})
        for rows in parts
    ]
    return ImageSet(DOGS.name, [folder_of[class_id] for class_id in label_of], *images)
