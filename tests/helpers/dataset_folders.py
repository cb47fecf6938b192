"""Writes tiny folders in the official format of each of the paper's data sets."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from scipy.io import savemat

CARS = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"]
DOGS = ["n02085620-Chihuahua", "n02086079-Pekinese", "n02113799-standard_poodle"]
AIRCRAFT = {"707-320": "Boeing 707", "F/A-18": "F/A-18", "Falcon 2000": "Falcon 2000", "737-200": "Boeing 737"}
# Ids neither contiguous nor sorted; class ids sort as numbers (3 < 20), not as text; a file name has a space.
CUB = {
    "images.txt": "30 003.Sooty_Albatross/b.jpg\n2 003.Sooty_Albatross/a.jpg\n7 020.Great_Auk/Auk 2.jpg\n"
    "4 020.Great_Auk/Auk_1.jpg\n",
    "image_class_labels.txt": "2 3\n7 20\n4 20\n30 3\n",
    "train_test_split.txt": "30 1\n4 0\n2 0\n7 1\n",
    "classes.txt": "20 020.Great_Auk\n3 003.Sooty_Albatross\n",
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


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(noise(40, 48, 3, seed=seed)).save(path)


def cells(values: Sequence[Any]) -> np.ndarray:
    """A cell array as MATLAB writes it: a column."""
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def write_annotations(file: Path, labels: Sequence[int | float | None], names: Sequence[str] = ()) -> None:
    """A car list: the structures of the devkit, without a class where the label is None."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    names = names or [f"{number:05}.jpg" for number in range(1, len(labels) + 1)]
    rows = [(39, 116, 569, 375, label, name) for label, name in zip(labels, names, strict=True)]
    if None in labels:
        fields.remove("class")
        rows = [(*row[:4], row[5]) for row in rows]
    savemat(file, {"annotations": np.array(rows, [(name, object) for name in fields]).reshape(1, -1)})


def write_cars(root: Path) -> None:
    (root / "devkit").mkdir(parents=True)
    savemat(root / "devkit/cars_meta.mat", {"class_names": cells(CARS).T})
    write_annotations(root / "devkit/cars_train_annos.mat", [3, 1, 2, 1])
    write_annotations(root / "devkit/cars_test_annos.mat", [None, None])
    write_annotations(root / "cars_test_annos_withlabels.mat", [2, 2])
    for folder, count in (("cars_train", 4), ("cars_test", 2)):
        for number in range(1, count + 1):
            draw(root / folder / f"{number:05}.jpg")


def write_dog_list(file: Path, rows: Sequence[tuple[Any, Any]], dtype: Any = np.uint8) -> None:
    names, labels = zip(*rows, strict=True)
    annotations = cells([str(name).removesuffix(".jpg") for name in names])
    labels = np.array(labels, dtype)[:, None]
    savemat(file, {"file_list": cells(names), "annotation_list": annotations, "labels": labels})


def dog_rows(numbers: Sequence[int]) -> list[tuple[Any, Any]]:
    return [
        (f"{folder}/{folder[:9]}_{number}.jpg", label) for number in numbers for label, folder in enumerate(DOGS, 1)
    ]


def write_dogs(root: Path) -> None:
    root.mkdir()
    write_dog_list(root / "train_list.mat", dog_rows([5927, 16]))
    write_dog_list(root / "test_list.mat", dog_rows([199])[:2])
    for name, _ in dog_rows([5927, 16, 199]):
        draw(root / "Images" / name)


def write_aircraft(root: Path) -> None:
    """Four variants with two training images and one for testing each; the archive's further lists are left out."""
    (root / "data").mkdir(parents=True)
    (root / "data/variants.txt").write_text("".join(f"{name}\n" for name in AIRCRAFT))
    images = [(f"{34309 + number:07}", name) for number, name in enumerate([*AIRCRAFT, *AIRCRAFT, *AIRCRAFT])]
    for file, rows in (("trainval", images[:8]), ("test", images[8:])):
        for kind, names in (("variant", {name: name for name in AIRCRAFT}), ("family", AIRCRAFT)):
            lines = "".join(f"{image_id} {names[variant]}\n" for image_id, variant in rows)
            (root / f"data/images_{kind}_{file}.txt").write_text(lines)
    for seed, (image_id, _) in enumerate(images):
        draw(root / f"data/images/{image_id}.jpg", seed)


def write_birds(lists: dict[str, str], root: Path) -> None:
    root.mkdir()
    for name, text in lists.items():
        (root / name).write_text(text)
    for seed, line in enumerate(lists["images.txt"].splitlines()):
        draw(root / "images" / line.split(maxsplit=1)[1], seed)


WRITERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "cub": ("CUB_200_2011", partial(write_birds, CUB)),
    "cars": ("stanford_cars", write_cars),
    "aircraft": ("fgvc-aircraft-2013b", write_aircraft),
    "dogs": ("dogs", write_dogs),
    "nabirds": ("nabirds", partial(write_birds, NABIRDS)),
}


def write(name: str, parent: Path) -> Path:
    """The folder of a data set, called as its archive calls it, in `parent`."""
    folder, writer = WRITERS[name]
    writer(parent / folder)
    return parent / folder
