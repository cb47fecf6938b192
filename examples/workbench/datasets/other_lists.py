"""Stanford Cars, Stanford Dogs and FGVC-Aircraft, each in lists of its own kind.

Cars have 196 classes of make, model and year; a family is a make. Dogs are of 120 breeds, without families. Aircraft
are of 100 variants; a family is what its makers call one, such as Boeing 737. Not torchvision's `StanfordCars` and
`FGVCAircraft`: they take paths out of the folder, and name no line of what is wrong.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from workbench.datasets import lists
from workbench.datasets.lists import Archive, ImageSet, Inside, check_apart, check_trained, read_lines, read_mat, whole

CAR_NAMES, CAR_TRAIN = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat"
CAR_TEST = ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat")
CARS = Archive(
    "Stanford Cars",
    expected="the folder that cars_train.tgz, cars_test.tgz and car_devkit.tgz were unpacked in",
    images="cars_train/, cars_test/",
    source="The page of Stanford Cars, https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is no longer there; "
    "https://github.com/pytorch/vision/issues/7545 collects where copies are. The labels of the test images, "
    "cars_test_annos_withlabels.mat, are a download of their own: the devkit's cars_test_annos.mat has none",
    folders=("stanford_cars",),
)
DOG_TRAIN, DOG_TEST = ("train_list.mat", "lists/train_list.mat"), ("test_list.mat", "lists/test_list.mat")
DOGS = Archive(
    "Stanford Dogs",
    expected="the folder that images.tar and lists.tar were unpacked in",
    images="Images/",
    source="Stanford Dogs is available from http://vision.stanford.edu/aditya86/ImageNetDogs/",
)
VARIANTS, VARIANT_TRAIN, VARIANT_TEST = "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"
FAMILIES = "images_family_trainval.txt"
AIRCRAFT = Archive(
    "FGVC-Aircraft",
    expected="fgvc-aircraft-2013b, its folder data, or the folder it was unpacked in",
    source="FGVC-Aircraft is available from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    folders=("data", "fgvc-aircraft-2013b/data"),
)


def read_cars(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read Stanford Cars; images come in the order of the lists. Errors and `complete` as in `read_cub`."""
    root, meta, train, test = CARS.find(root, CAR_NAMES, CAR_TRAIN, CAR_TEST)

    def parse_class(name: Any) -> tuple[str, None]:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"must be a name, not {name!r}")
        return name, None

    def parse_image(name: Any, class_id: Any) -> tuple[str, Any]:
        if not 1 <= whole(class_id) <= len(classes):
            raise ValueError(f"class {class_id} is not one of 1 to {len(classes)}")
        path = inside(name)
        return f"{inside.folder}/{path}", (path, whole(class_id) - 1)

    classes, parts = list(read_mat(meta, ["class_names"], parse_class)), []
    for listing, inside in ((train, Inside(root, "cars_train")), (test, Inside(root, "cars_test"))):
        rows = read_mat(listing, ["fname", "class"], parse_image, struct="annotations")
        parts.append(CARS.images_at(root / inside.folder, rows, listing, complete=complete))
    check_trained(train, [classes[image.label] for image in parts[0]], meta, classes, "class name")
    return ImageSet(CARS.name, classes, *parts, families=[name.split()[0] for name in classes])


def read_dogs(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read Stanford Dogs; a class is called like its folder. Errors and `complete` as in `read_cub`.

    The lists may lie in a folder lists/. Images come in the order of the lists, classes in that of their numbers.
    """
    root, train, test = DOGS.find(root, DOG_TRAIN, DOG_TEST)
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

    listed = {listing: read_mat(listing, ["file_list", "labels"], parse) for listing in (train, test)}
    check_apart(train, listed[train], test, listed[test], "image")
    check_trained(train, (class_id for _, class_id in listed[train].values()), test, folder_of, "class label")
    label_of = {class_id: label for label, class_id in enumerate(sorted(folder_of))}
    parts = []
    for listing, rows in listed.items():
        labelled = {key: (path, label_of[class_id]) for key, (path, class_id) in rows.items()}
        parts.append(DOGS.images_at(root / "Images", labelled, listing, complete=complete))
    return ImageSet(DOGS.name, [folder_of[class_id] for class_id in label_of], *parts)


def read_aircraft(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read FGVC-Aircraft by variants, trained on its training and validation images; errors are as in `read_cub`.

    `root` is the folder fgvc-aircraft-2013b, its folder data, or the one that it was unpacked in. Images come in the
    order of the lists, classes in that of variants.txt.
    """
    root, variants, train, test, families = AIRCRAFT.find(root, VARIANTS, VARIANT_TRAIN, VARIANT_TEST, FAMILIES)
    inside = Inside(root, "images")

    def parse(image_id: str, name: str) -> tuple[str, str]:  # ids are text, for some begin with 0
        inside(f"{image_id}.jpg")
        return image_id, name

    label_of = {name: label for label, name in enumerate(read_lines(variants, "<variant>", lambda name: (name, None)))}
    listed = {file: read_lines(file, "<image_id> <variant>", parse) for file in (train, test)}
    families_of_images = read_lines(families, "<image_id> <family>", parse)
    lists.check_ids(train, listed[train], families, families_of_images)
    family_of: dict[str, str] = {}
    for image_id, name in listed[train].items():
        found = families_of_images[image_id]
        first = family_of.setdefault(name, found)
        if first != found:
            problem = f"{families} puts images of {name} ({train}) into {first} and {found}"
            raise ValueError(f"{problem}; unpack the archive again")
    check_apart(train, listed[train], test, listed[test])
    check_trained(train, listed[train].values(), variants, label_of, "variant")
    parts = []
    for file, names in listed.items():
        lists.check_known(file, names.values(), variants, label_of, "variant")
        rows = {image_id: (PurePosixPath(f"{image_id}.jpg"), label_of[name]) for image_id, name in names.items()}
        parts.append(AIRCRAFT.images_at(root / "images", rows, file, complete=complete))
    return ImageSet(AIRCRAFT.name, list(label_of), *parts, families=[family_of[name] for name in label_of])
