"""Writes tiny folders in the official format of each of the paper's data sets."""

from functools import partial

import numpy as np
import PIL.Image
from scipy.io import savemat

CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
DOGS = ["n02085620-Chihuahua", "n02086079-Pekinese", "n02113799-standard_poodle"]
AIRCRAFT = {"707-320": "Boeing 707", "F/A-18": "F/A-18", "Falcon 2000": "Falcon 2000", "737-200": "Boeing 737"}
# Ids neither contiguous nor sorted; class ids sort as numbers (3 < 20), not as text; a file name has a space.
CUB = {
    "images.txt": "30 003.Sooty_Albatross/b.jpg\n2 003.Sooty_Albatross/a.jpg\n7 020.Mockingbird/Auk 2.jpg\n"
    "4 020.Mockingbird/Auk_1.jpg\n",
    "image_class_labels.txt": "2 3\n7 20\n4 20\n30 3\n",
    "train_test_split.txt": "30 1\n4 0\n2 0\n7 1\n",
    "classes.txt": "20 020.Mockingbird\n3 003.Sooty_Albatross\n",
}
# Ids and folders in the style of NABirds: a child is in a folder of its class id.
IMAGES = {f"{i:08x}-21dc-4d0c-bfe1-4cae3c85c829": label for i, label in enumerate((817, 817, 295, 295, 900, 900))}
NABIRDS = {
    "images.txt": "".join(f"{i} {label:04}/{i.replace('-', '')}.jpg\n" for i, label in IMAGES.items()),
    "image_class_labels.txt": "".join(f"{i} {label}\n" for i, label in IMAGES.items()),
    "train_test_split.txt": "".join(f"{i} {1 - number % 2}\n" for number, i in enumerate(IMAGES)),
    "classes.txt": "0 Birds\n1 Ducks, Geese, and Swans\n295 Oldsquaw (Breeding male)\n22 Oldsquaw\n"
    "817 Mallard (Female/Eclipse male)\n23 Mallard\n900 Oldsquaw (Female)\n",
    "hierarchy.txt": "1 0\n22 1\n23 1\n295 22\n900 22\n817 23\n",
}


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(noise(40, 48, 3, seed=seed)).save(path)


def cells(values):
    """A cell array as MATLAB writes it: a column."""
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def save_cars(file, labels, names=()):
    """The structures of the devkit."""
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    names = names or [f"{number:05}.jpg" for number in range(1, len(labels) + 1)]
    rows = [(39, 116, 569, 375, *row) for row in zip(labels, names, strict=True)]
    savemat(file, {"annotations": np.array(rows, fields).reshape(1, -1)})


def write_cars(root):
    (root / "devkit").mkdir()
    savemat(root / "devkit/cars_meta.mat", {"class_names": cells(CARS).T})
    save_cars(root / "devkit/cars_train_annos.mat", [3, 1, 2, 1])
    save_cars(root / "cars_test_annos_withlabels.mat", [2, 2])
    return [*(f"cars_train/{number:05}.jpg" for number in range(1, 5)), "cars_test/00001.jpg", "cars_test/00002.jpg"]


def save_dogs(file, rows, dtype=np.uint8):
    names, labels = zip(*rows, strict=True)
    savemat(file, {"file_list": cells(names), "labels": np.array(labels, dtype)[:, None]})


def dog_rows(*numbers):
    """For each number an image of each breed: its name and its label."""
    return [(f"{folder}/{folder[:9]}_{number}.jpg", row) for number in numbers for row, folder in enumerate(DOGS, 1)]


def write_dogs(root):
    """Labels are not in order, and some are doubles, as MATLAB often stores integers."""
    save_dogs(root / "train_list.mat", dog_rows(5927, 16)[::-1], np.float64)
    save_dogs(root / "test_list.mat", dog_rows(199)[:2])
    return [f"Images/{name}" for name, _ in dog_rows(5927, 16, 199)]


def write_aircraft(root):
    """Four variants with two training images and one for testing each; the archive's further lists are left out."""
    (root / "variants.txt").write_text("".join(f"{name}\n" for name in AIRCRAFT))
    images = [(f"{34309 + number:07}", name) for number, name in enumerate([*AIRCRAFT, *AIRCRAFT, *AIRCRAFT])]
    families = [(image_id, AIRCRAFT[name]) for image_id, name in images]
    lists = {"variant_trainval": images[:8], "variant_test": images[8:], "family_trainval": families[:8]}
    for name, rows in lists.items():
        (root / f"images_{name}.txt").write_text("".join(f"{image_id} {group}\n" for image_id, group in rows))
    return [f"images/{image_id}.jpg" for image_id, _ in images]


def write_birds(lists, root, encoding="utf-8", end="\n"):
    for name, text in lists.items():
        (root / name).write_text(text.replace("\n", end), encoding, newline="")
    return [f"images/{line.split(maxsplit=1)[1]}" for line in lists["images.txt"].splitlines()]


# What writes the lists into the folder of each, and returns the images. The lists of NABirds are as another system may
# leave them: a byte order mark, Windows' line ends, spaces and blank lines.
WRITERS = {
    "cub": ("CUB_200_2011", partial(write_birds, CUB)),
    "cars": ("stanford_cars", write_cars),
    "aircraft": ("fgvc-aircraft-2013b/data", write_aircraft),
    "dogs": ("dogs", write_dogs),
    "nabirds": ("nabirds", partial(write_birds, NABIRDS, encoding="utf-8-sig", end=" \r\n\r\n")),
}


def write(name, parent):
    """The folder of a data set, called as its archive calls it, in `parent`."""
    folder, writer = WRITERS[name]
    (parent / folder).mkdir(parents=True)
    for seed, image in enumerate(writer(parent / folder)):
        draw(parent / folder / image, seed)
    return parent / folder
