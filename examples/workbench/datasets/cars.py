"""Stanford Cars: 196 classes of make, model and year; a family is a make."""

from pathlib import Path
from typing import Any

from workbench.datasets.common import Archive, ImageSet, images_at
from workbench.datasets.lists import Inside, check_trained, read_mat, whole

NAMES, TRAIN = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"
TEST = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
CARS = Archive(
    "Stanford Cars",
    expected="the folder that cars_train.tgz, cars_test.tgz and car_devkit.tgz were unpacked in",
    images="cars_train/, cars_test/",
    source="The page of Stanford Cars, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is no longer there; "
    "https://github.com/pytorch/vision/issues/7545 collects where copies are to be had. The labels of the test images, "
    "cars_test_annos_withlabels.mat, are a download of their own: the devkit's cars_test_annos.mat has none",
    folders=("stanford_cars",),
)


def read_cars(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read Stanford Cars; images come in the order of the lists. Errors and `complete` as in `read_cub`."""
    root, meta, train, test = CARS.find(root, NAMES, TRAIN, TEST)
    classes = list(read_mat(meta, ["class_names"], _class_name))
    parts = []
    for folder, listing in (("cars_train", train), ("cars_test", test)):
        rows = _read_annotations(listing, Inside(root, folder), len(classes))
        if complete:
            CARS.check_images(root / folder, [path for path, _ in rows.values()], listing)
        parts.append(images_at(root / folder, rows))
    check_trained(train, [classes[image.label] for image in parts[0]], meta, classes, "class name")
    return ImageSet(CARS.name, classes, *parts, families=[name.split()[0] for name in classes])


def _class_name(name: Any) -> tuple[str, None]:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"must be a name, not {name!r}")
    return name, None


def _read_annotations(file: Path, inside: Inside, num_classes: int) -> dict[Any, Any]:
    """{path from the data set's folder: (path in the images' folder, label)}."""

    def parse(name: Any, class_id: Any) -> tuple[str, Any]:
        if not 1 <= whole(class_id) <= num_classes:
            raise ValueError(f"class {class_id} is not one of 1 to {num_classes}")
        path = inside(name)
        return f"{inside.folder}/{path}", (path, whole(class_id) - 1)

    return read_mat(file, ["fname", "class"], parse, struct="annotations")
