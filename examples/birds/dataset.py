"""Writes a synthetic fine-grained bird set in the folder format of CUB-200-2011, so that everything runs offline.

Species come in families of four or five that share build and colours and differ in one or two small marks.
"""

import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map

from birds.draw import MARKED_PARTS, PARTS, BirdImage, Build, Family, Mark, Species, draw_bird
from birds.scenery import COLOURS

VERSION = 1  # of the pictures and files: raise it whenever the same settings give other bytes
STANDS_OUT = 165  # distance in RGB
FEW_IMAGES = 400  # are drawn sooner than worker processes have started


def _table(name: str) -> list[list[str]]:
    """The rows of a table beside this file, whose columns are the fields of the class that they describe, in order."""
    return [line.split() for line in Path(__file__).with_name(name).read_text().splitlines()[1:]]


BUILDS = {name: Build(*map(float, numbers)) for name, *numbers in _table("builds.txt")}
FAMILIES = tuple(
    Family(name, BUILDS[build], *looks, varies=(first, second))
    for name, build, *looks, first, second in _table("families.txt")
)

# For each part: the colour of its family that it is seen against, and marks: kind, colours to try, adjective.
OPTIONS = {
    "beak": ("bill", ("medium", "orange black yellow", "{}_Billed"), ("long", "", "Long_Billed")),
    "crown": ("head", ("cap", "black white yellow", "{}_Capped"), ("stripe", "rufous red yellow white", "{}_Crowned")),
    "eye": ("head", ("ring", "white yellow", "{}_Eyed"), ("ring", "red yellow blue", "{}_Eyed")),
    "bar": ("wing", ("single", "white black", "{}_Barred"), ("double", "white black", "Double_Barred")),
    "belly": ("belly", ("spots", "black white", "Spotted"), ("patch", "rufous yellow white", "{}_Bellied")),
    "tail": ("wing", ("tip", "white black", "{}_Tailed"), ("band", "buff black", "Band_Tailed")),
}
PLACES = ("Harrow", "Tarnwick", "Eastmarch", "Calder", "Ashmoor", "Lowland", "Fenwick", "Marrowby", "Selby", "Orrin")
# The species of a family, by their options of its two parts. The second and the fourth are named after places.
PATTERN = ((1, 0), (0, 0), (2, 0), (1, 2), (0, 2))


def _option(family: Family, part: str, number: int) -> tuple[Mark, str]:
    """The mark that is option `number` of a part (0: plain) for the family, and the adjective for it."""
    if number == 0:
        return (Mark("medium", family.bill) if part == "beak" else Mark()), ""
    ground = getattr(family, OPTIONS[part][0])
    kind, names, adjective = OPTIONS[part][number]
    gaps = {n: np.linalg.norm(np.subtract(COLOURS[n], COLOURS[ground])) for n in names.split() or [ground]}
    colour = next((name for name, gap in gaps.items() if gap > STANDS_OUT), max(gaps, key=gaps.get))
    return Mark(kind, colour), adjective.format(colour.title())


def _species(index: int, member: int) -> Species:
    """The species number `member` of the family number `index`."""
    family, numbers = FAMILIES[index], PATTERN[member]
    chosen = dict(zip(family.varies, numbers, strict=True))
    options = {part: _option(family, part, chosen.get(part, 0)) for part in MARKED_PARTS}
    named = [adjective for _, adjective in options.values() if adjective]
    adjective = named[0] if len(named) == 1 else PLACES[(2 * index + member // 2) % len(PLACES)]
    return Species(f"{adjective}_{family.name}", family, **{part: mark for part, (mark, _) in options.items()})


def catalogue(species: int) -> list[Species]:
    """The species of a set with that many, family after family; raises ValueError if there are not that many."""
    most = len(PATTERN) * len(FAMILIES)
    if not 2 <= species <= most:
        raise ValueError(f"species must be from 2 to {most}, got {species}")
    families = -(-species // len(PATTERN))
    return [_species(i, k) for i in range(families) for k in range(species // families + (i < species % families))]


def differing_parts(a: Species, b: Species) -> frozenset[str]:
    """The parts in which two species of one family differ; raises ValueError if they are of different families."""
    if a.family.name != b.family.name:
        raise ValueError(f"{a.name} and {b.name} are of different families: they differ in build and colours as well")
    return frozenset(part for part in MARKED_PARTS if getattr(a, part) != getattr(b, part))


def read_species(root: str | Path) -> dict[str, Species]:
    """The species of a written set by class name ("001.White_Barred_Tern"), as its birds.json describes them."""
    families, species = {family.name: family for family in FAMILIES}, {}
    for c in json.loads((Path(root) / "birds.json").read_text())["classes"]:
        marks, name = {part: Mark(*mark) for part, mark in c["traits"].items()}, c["name"].partition(".")[2]
        species[c["name"]] = Species(name, families[c["family"]], **marks)
    return species


def read_places(root: str | Path) -> tuple[dict[int, list[float]], dict[int, dict[str, tuple[float, float]]]]:
    """By image id, the bird's box (x, y, width, height) and (x, y) of its visible parts, in pixels of a written set."""
    boxes, places = (np.loadtxt(Path(root) / name) for name in ("bounding_boxes.txt", "parts/part_locs.txt"))
    parts: dict[int, dict[str, tuple[float, float]]] = {int(image): {} for image, *_ in boxes}
    for image, part, x, y, _ in places[places[:, 4] == 1]:
        parts[int(image)][PARTS[int(part) - 1]] = (x, y)
    return {int(image): list(box) for image, *box in boxes}, parts


def _draw_species(settings: dict[str, int], root: Path, index: int) -> list[tuple[str, BirdImage]]:
    """Writes the images of one species; returns their paths and annotations (without the pictures)."""
    species, images = catalogue(settings["species"])[index], settings["images_per_species"]
    folder, drawn = f"{index + 1:03d}.{species.name}", []
    (root / "images" / folder).mkdir()
    for i in range(images):
        bird = draw_bird(species, rng := np.random.default_rng((settings["seed"], index, i)), settings["size"])
        path = f"{folder}/{species.name}_{i + 1:04d}_{index * images + i + 1}.jpg"
        bird.picture.save(root / "images" / path, quality=int(rng.integers(55, 93)))
        drawn.append((path, bird._replace(picture=None)))
    return drawn


def _write(settings: dict[str, int], root: Path, workers: int, progress: bool) -> None:
    (root / "images").mkdir(parents=True)
    (root / "parts").mkdir()
    per_species, species = settings["images_per_species"], catalogue(settings["species"])
    draw, numbers = partial(_draw_species, settings, root), range(len(species))
    bar = {"desc": "drawing birds", "unit": " species", "disable": not progress}
    if workers > 1 and len(species) * per_species >= FEW_IMAGES:
        images = process_map(draw, numbers, max_workers=workers, chunksize=1, **bar)
    else:
        images = map(draw, tqdm(numbers, **bar))
    drawn = list(enumerate(itertools.chain.from_iterable(images), 1))
    classes = [
        {"name": f"{i:03d}.{s.name}", "family": s.family.name, "traits": {p: getattr(s, p) for p in MARKED_PARTS}}
        for i, s in enumerate(species, 1)
    ]
    tables = {
        "images": [(i, path) for i, (path, _) in drawn],
        "image_class_labels": [(i, (i - 1) // per_species + 1) for i, _ in drawn],
        # Poses are drawn independently, so that every second image is as good as a random half.
        "train_test_split": [(i, 1 - (i - 1) % per_species % 2) for i, _ in drawn],
        "bounding_boxes": [(i, *bird.box) for i, (_, bird) in drawn],
        "classes": [(i, c["name"]) for i, c in enumerate(classes, 1)],
        "parts/parts": list(enumerate(PARTS, 1)),
        "parts/part_locs": [
            (i, k, round(x, 1), round(y, 1), int(visible))
            for i, (_, bird) in drawn
            for k, (x, y, visible) in enumerate((bird.parts[part] for part in PARTS), 1)
        ],
    }
    for name, rows in tables.items():
        (root / f"{name}.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    (root / "birds.json").write_text(json.dumps(settings | {"classes": classes}, indent=1) + "\n")


def write_birds(
    root: str | Path,
    *,
    species: int = 200,
    images_per_species: int = 60,
    size: int = 448,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes a bird set in the folder format of CUB-200-2011, or finds it written already; returns the folder.

    The bytes depend on the arguments only, not on the number of workers, of which None is one for each processor. The
    seed is that of poses, scenes and light: the species are always the same. An interrupted run leaves no `root`. A
    ValueError says that an argument is out of range, a FileExistsError that `root` holds anything but this very set.
    """
    catalogue(species)
    for name, value, least in (("images_per_species", images_per_species, 2), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    root, settings = Path(root), {"version": VERSION, "species": species, "images_per_species": images_per_species}
    settings |= {"size": size, "seed": seed}
    if root.is_file() or (root.exists() and any(root.iterdir())):
        try:
            found = {name: json.loads((root / "birds.json").read_text())[name] for name in settings}
        except (OSError, ValueError, KeyError):
            found = "something else than a bird set"
        if found != settings:
            advice = "choose another folder, or remove this one first"
            raise FileExistsError(f"{root} holds {found}, not {settings}: {advice}")
        return root
    partial_root = root.with_name(f".{root.name}.{os.getpid()}.partial")
    try:
        _write(settings, partial_root, os.cpu_count() or 1 if workers is None else workers, progress)
        partial_root.replace(root)
    finally:
        shutil.rmtree(partial_root, ignore_errors=True)
    return root


def contact_sheet(root: str | Path, columns: int = 8, cell: int = 128) -> Image.Image:
    """A sheet of a written set: a row of images per species, its name at the left, families as blocks."""
    margin, gap, species = 190, 14, read_species(root)
    families = list(dict.fromkeys(s.family.name for s in species.values()))
    sheet = Image.new("RGB", (margin + columns * cell, len(species) * cell + len(families) * gap), "white")
    for row, (name, s) in enumerate(species.items()):
        top = row * cell + gap * families.index(s.family.name)
        ImageDraw.Draw(sheet).text((6, top + cell // 2), name.replace("_", " "), "black")
        for i, path in enumerate(sorted((Path(root) / "images" / name).iterdir())[:columns]):
            with Image.open(path) as picture:
                sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (margin + i * cell, top))
    return sheet
