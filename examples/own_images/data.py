"""Any folder of class folders, or a CSV of path,label, as a list of labelled images that were looked at first."""

import csv
import hashlib
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Item(NamedTuple):
    path: Path
    label: str


def read(source: Path, test_share: float = 0.25, seed: int = 0) -> tuple[list[Item], list[Item]]:
    """Training and test images; those of DIR/train and DIR/test or DIR/val, or else split here."""
    if source.is_file():
        return split(read_csv(source), test_share, seed)
    if not source.is_dir():
        raise SystemExit(f"{source}: no such folder or CSV file")
    if (source / "train").is_dir():
        for name in ("test", "val"):
            if (source / name).is_dir():
                return read_folder(source / "train"), read_folder(source / name)
    return split(read_folder(source), test_share, seed)


def read_folder(folder: Path) -> list[Item]:
    items = [
        Item(path, each.name)
        for each in sorted(folder.iterdir())
        if each.is_dir()
        for path in sorted(each.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not items:
        raise SystemExit(f"{folder}: no images in folders of classes, as in {folder / 'some_class' / 'image.jpg'}")
    return items


def read_csv(file: Path) -> list[Item]:
    """Rows of path,label after a header of these names; the paths are within the CSV's folder, whatever it says."""
    root = file.parent.resolve()
    items = []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        if not {"path", "label"} <= set(rows.fieldnames or ()):
            raise SystemExit(f"{file}: the first line must name the columns path and label, got {rows.fieldnames}")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if not row["path"] or not row["label"]:
                raise SystemExit(f"{where}: a path and a label are needed, got {row}")
            path = (root / row["path"]).resolve()
            if Path(row["path"]).is_absolute() or not path.is_relative_to(root):
                raise SystemExit(f"{where}: {row['path']} leads out of the folder {file.parent}")
            if not path.is_file():
                raise SystemExit(f"{where}: {row['path']}: no such file")
            items.append(Item(path, row["label"]))
    if not items:
        raise SystemExit(f"{file}: no rows")
    return items


def split(items: list[Item], test_share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """The same share of each class for testing, at least one image where a class has two, drawn by seed."""
    rng = random.Random(seed)
    train, test = [], []
    for _, members in sorted(by_class(items).items()):
        members = sorted(members)
        rng.shuffle(members)
        count = min(len(members) - 1, max(1, round(test_share * len(members))))
        test += members[:count]
        train += members[count:]
    return train, test


def by_class(items: list[Item]) -> dict[str, list[Item]]:
    classes = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    return dict(classes)


def warnings(train: list[Item], test: list[Item]) -> list[str]:
    """What is wrong with the data, but no reason to stop."""
    sizes = {name: len(members) for name, members in by_class(train).items()}
    found = [f"{name}: one training image, nobody of its class to pair it with" for name in sizes if sizes[name] < 2]
    if max(sizes.values()) >= 10 * min(sizes.values()):
        found.append(f"the largest class has {max(sizes.values())} training images, the smallest {min(sizes.values())}")
    seen = {digest(item.path): item.path for item in train}
    found += [
        f"{item.path} of the test images is the training image {seen[digest(item.path)]}"
        for item in test
        if digest(item.path) in seen
    ]
    return found


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise SystemExit(f"{path}: not a readable image ({error})") from None
