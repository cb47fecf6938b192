"""Reads CUB-200-2011 from the folder of its official archive, and hands its images to a DataLoader."""

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch.utils.data import Dataset
from torchvision import transforms

SOURCE = "CUB-200-2011 is to be had from https://www.vision.caltech.edu/datasets/cub_200_2011/"
IMAGES, LABELS, SPLIT, CLASSES = "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"
BOXES, PARTS, PART_PLACES = "bounding_boxes.txt", "parts/parts.txt", "parts/part_locs.txt"
Stats = Sequence[float]


class Image(NamedTuple):
    """One image of a data set; `label` counts from 0 in the order of class ids, `image_id` is as in the files."""

    path: Path
    label: int
    image_id: int


@dataclass(frozen=True)
class ImageSet:
    """A data set with its official split; `classes` has the names by label."""

    name: str
    classes: list[str]
    train: list[Image]
    test: list[Image]


def read_cub(root: str | Path) -> ImageSet:
    """Read the lists of CUB-200-2011, and check them against each other and the images on disk.

    `root` is the folder CUB_200_2011, or the one that it was unpacked in. Images come in the order of their ids.

    Raises:
        FileNotFoundError: root, a list or images are missing.
        ValueError: a list is malformed, or two don't fit together; the message names the files and the place.
    """
    root, paths = _find(root, IMAGES, LABELS, SPLIT, CLASSES)
    class_ids = _read(root / LABELS, "<image_id> <class_id>", lambda image, label: (int(image), int(label)))
    in_train = _read(root / SPLIT, "<image_id> <is_training_image>", lambda image, flag: (int(image), _flag(flag)))
    names = _read(root / CLASSES, "<class_id> <class_name>", lambda label, name: (int(label), name))
    _check_ids(root / IMAGES, paths, root / LABELS, class_ids)
    _check_ids(root / IMAGES, paths, root / SPLIT, in_train)
    _check_ids(root / LABELS, class_ids.values(), root / CLASSES, names, "class id")
    untrained = names.keys() - {class_ids[image_id] for image_id in paths if in_train[image_id]}
    if untrained:
        lacking = f"{root / SPLIT} has no training images for {_some('class id', untrained)}"
        raise ValueError(f"{lacking}; each class of {root / CLASSES} needs at least one")
    # One listing per folder instead of a question per image: quick, and exact about case on macOS too.
    walk = os.walk(root / "images", followlinks=True)
    on_disk = {os.path.join(folder, file) for folder, _, files in walk for file in files}
    missing = [str(path) for path in paths.values() if str(root / "images" / path) not in on_disk]
    if missing:
        lacking = f"{root / 'images'} lacks {_some('image', missing)} of the {len(paths)} in {root / IMAGES}"
        raise FileNotFoundError(f"{lacking} (upper and lower case count); unpack the archive anew. {SOURCE}")
    label_of = {class_id: label for label, class_id in enumerate(sorted(names))}
    dataset = ImageSet("CUB-200-2011", [names[class_id] for class_id in label_of], [], [])
    for image_id, path in sorted(paths.items()):
        part = dataset.train if in_train[image_id] else dataset.test
        part.append(Image(root / "images" / path, label_of[class_ids[image_id]], image_id))
    return dataset


def read_boxes(root: str | Path) -> dict[int, tuple[float, float, float, float]]:
    """The bird's box in each image, {image_id: (x, y, width, height)} in pixels; root and errors as in `read_cub`."""
    root, paths = _find(root, IMAGES, BOXES)
    form = "<image_id> <x> <y> <width> <height>"
    boxes = _read(root / BOXES, form, lambda image, x, y, w, h: (int(image), (float(x), float(y), float(w), float(h))))
    _check_ids(root / IMAGES, paths, root / BOXES, boxes)
    return boxes


def read_parts(root: str | Path) -> tuple[list[str], dict[int, dict[str, tuple[float, float]]]]:
    """The names of all parts by id, and {image_id: {part name: (x, y)}} in pixels, with the parts visible there.

    Every image is a key, even if none of its parts is visible. Root and errors are as in `read_cub`.
    """
    root, paths = _find(root, IMAGES, PARTS, PART_PLACES)
    names = _read(root / PARTS, "<part_id> <part name>", lambda part, name: (int(part), name))
    form = "<image_id> <part_id> <x> <y> <visible>"
    places = _read(root / PART_PLACES, form, lambda i, p, x, y, v: ((int(i), int(p)), (_flag(v), float(x), float(y))))
    _check_ids(root / IMAGES, paths, root / PART_PLACES, (image for image, _ in places))
    _check_ids(root / PART_PLACES, (part for _, part in places), root / PARTS, names, "part id")
    visible: dict[int, dict[str, tuple[float, float]]] = {}
    for (image_id, part_id), (seen, x, y) in sorted(places.items()):
        visible.setdefault(image_id, {}).update({names[part_id]: (x, y)} if seen else {})
    return [name for _, name in sorted(names.items())], visible


def family(class_name: str) -> str:
    """The last word of a class name: "001.Black_footed_Albatross" is an "Albatross"."""
    return re.split(r"[._ ]", class_name)[-1]


def load_image(path: str | Path) -> PIL.Image.Image:
    """Decode an image to RGB, upright as its EXIF says; transparency is dropped.

    There is no replacement picture: the published loader puts a white one in place of a broken image, unnoticed.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no image, or a broken one.
    """
    data = Path(path).read_bytes()
    try:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
        if image.mode == "F" or image.mode.startswith("I"):  # 16-bit grey: convert() would turn all above 255 white
            grey = np.asarray(image)
            if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
                raise ValueError(f"mode {image.mode}, {grey.min()} to {grey.max()}, does not say what is white")
            image = PIL.Image.fromarray((grey // 256).astype(np.uint8))
        if image.mode == "P":
            image = image.convert("RGBA")  # Pillow warns of a transparent palette that goes straight to RGB
        return image.convert("RGB")
    except PIL.UnidentifiedImageError:  # names a BytesIO object instead of the file
        raise ValueError(f"{path} ({len(data)} bytes) is no image that Pillow knows; replace the file") from None
    except Exception as error:  # decoders raise whatever they stumble over: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"{path} ({len(data)} bytes) cannot be decoded: {error}; replace the file") from error


class ImageDataset(Dataset[tuple[Any, int, int]]):
    """(transformed image, label, index) triples.

    Args:
        images: `train` or `test` of an `ImageSet`.
        transform: of a PIL image, such as `train_transform(...)`.
        resize: squash images to resize x resize before the transform. Given the transform's own `resize`, items are
            the same as without, and a cache holds small pictures.
        cache: keep decoded (and resized) images in memory from their first use on. Each worker process of a
            DataLoader has its own cache, so keep workers alive with `persistent_workers=True`, or have none.
    """

    def __init__(
        self, images: Sequence[Image], transform: Callable[..., Any], *, resize: int | None = None, cache: bool = False
    ) -> None:
        self.images, self.transform, self.cache = list(images), transform, cache
        self.labels = [image.label for image in self.images]
        self._squash = transforms.Compose([transforms.Resize((resize, resize))] if resize is not None else [])
        self._pictures: dict[int, PIL.Image.Image] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        picture = self._pictures.get(index)
        if picture is None:
            picture = self._squash(load_image(self.images[index].path))
            if self.cache:
                self._pictures[index] = picture
        return self.transform(picture), self.labels[index], index


# Not timm.data.create_transform: for training, it has no squash + random crop, which is what was published. For
# testing, its crop_mode="squash" is the same, but takes crop / resize and rounds: 144 of 224 would be 144 of 223.
def train_transform(resize: int, crop: int, *, mean: Stats = MEAN, std: Stats = STD) -> transforms.Compose:
    """Squash to resize x resize, take crop x crop pixels of that at random, mirrored or not, and normalise."""
    return _transform(resize, crop, [transforms.RandomCrop(crop), transforms.RandomHorizontalFlip()], mean, std)


def test_transform(resize: int, crop: int, *, mean: Stats = MEAN, std: Stats = STD) -> transforms.Compose:  # noqa: PT028
    """Squash to resize x resize, take the central crop x crop pixels of that, and normalise."""
    return _transform(resize, crop, [transforms.CenterCrop(crop)], mean, std)


test_transform.__test__ = False  # type: ignore[attr-defined]  # else pytest runs it where a test imports it


def _transform(resize: int, crop: int, steps: list[Any], mean: Stats, std: Stats) -> transforms.Compose:
    if not 0 < crop <= resize:  # CenterCrop would pad with black
        raise ValueError(f"crop must be in [1, resize], got crop={crop} and resize={resize}")
    steps = [transforms.Resize((resize, resize)), *steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)


def _find(root: str | Path, *lists: str) -> tuple[Path, dict[int, PurePosixPath]]:
    """The folder with these lists, which is root or its CUB_200_2011, and {image_id: path under images/}."""
    root = Path(root)
    if not (root / IMAGES).exists() and (root / "CUB_200_2011").is_dir():
        root = root / "CUB_200_2011"
    missing = [name for name in lists if not (root / name).is_file()]
    if missing:
        problem = f"{root} has no {', '.join(missing)}" if root.is_dir() else f"{root} is no folder"
        expected = f"CUB_200_2011 or the folder it was unpacked in, with {', '.join(lists)} and images/"
        raise FileNotFoundError(f"{problem}; expected {expected}. {SOURCE}")
    return root, _read(root / IMAGES, "<image_id> <path under images/>", lambda i, path: (int(i), _inner(path)))


def _read(file: Path, form: str, parse: Callable[..., tuple[Any, Any]]) -> dict[Any, Any]:
    """What `parse` makes of the columns of each line: (key, value). The last column may contain spaces."""
    rows, columns = dict[Any, Any](), form.count("<")
    # surrogateescape: file names need not be UTF-8, and are spelt like this in listings of folders too.
    for number, line in enumerate(file.read_text("utf-8-sig", errors="surrogateescape").split("\n"), 1):
        fields = line.strip().split(maxsplit=columns - 1)
        if not fields:
            continue
        try:
            if len(fields) < columns:
                raise ValueError(f"{len(fields)} of {columns} columns")
            key, value = parse(*fields)
            if key in rows:
                raise ValueError(f"id {key} was in an earlier line")
        except ValueError as error:
            expected = f"expected {form!r}; unpack the archive anew"
            raise ValueError(f"{file}, line {number}, {line!r}: {error}; {expected}") from error
        rows[key] = value
    if not rows:
        raise ValueError(f"{file} is empty, expected lines {form!r}; unpack the archive anew")
    return rows


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(f"must be 0 or 1, not {text!r}")
    return text == "1"


def _inner(text: str) -> PurePosixPath:
    windows = PureWindowsPath(text)  # knows both separators and drive letters
    if windows.anchor or ".." in windows.parts:
        raise ValueError("the path leaves images/")
    return PurePosixPath(text)


def _check_ids(file: Path, ids: Iterable[int], other: Path, other_ids: Iterable[int], what: str = "image id") -> None:
    ids, other_ids = set(ids), set(other_ids)
    for here, there, extra in ((file, other, ids - other_ids), (other, file, other_ids - ids)):
        if extra:
            raise ValueError(f"{_some(what, extra)} of {here} not in {there}; unpack the archive anew")


def _some(what: str, items: Iterable[Any], shown: int = 5) -> str:
    """The count and the first few: "7 images (1, 2, 3, 4, 5, ...)"."""
    items = sorted(items)
    first = [*map(str, items[:shown]), *["..."] * (len(items) > shown)]
    return f"{len(items)} {what}{'s' * (len(items) != 1)} ({', '.join(first)})"
