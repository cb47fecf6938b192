"""Writes a synthetic fine-grained bird set in the folder format of CUB-200-2011, so that everything runs offline.

Species come in families of four or five that share build and colours and differ in one or two small marks.
"""

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from birds.draw import MARKED_PARTS, PARTS, Build, Family, Mark, Species, draw_bird
from birds.scenery import COLOURS, BirdImage

VERSION = 1  # of the pictures and files: raise it whenever the same settings give other bytes
STANDS_OUT = 165  # distance in RGB
FEW_IMAGES = 400  # are drawn sooner than worker processes have started

# Columns: the fields of Build, in their order.
_BUILDS = """
songbird   24 0.25 0.18 0.03 0.75 0.40 0.05 1.1 0.50  0.15   0 0.72 0.20
finch      28 0.27 0.20 0.02 0.80 0.62 0.15 1.3 0.42  0.35   0 0.68 0.16
warbler    18 0.22 0.17 0.02 0.85 0.24 0.00 1.2 0.45  0.00   5 0.68 0.24
crested    34 0.24 0.18 0.03 0.85 0.40 0.10 1.3 0.62 -0.10   0 0.68 0.20 1.5
wren       16 0.27 0.19 0.00 1.10 0.22 0.28 1.2 0.34 -0.20  62 0.56 0.24
tern        6 0.20 0.18 0.04 1.45 0.28 0.12 1.2 0.50  0.75   0 0.92 0.10 0 1
gull       10 0.24 0.16 0.08 1.20 0.32 0.20 2.4 0.34  0.00   0 0.98 0.24 0 1
swallow    30 0.19 0.17 0.00 0.45 0.28 0.05 1.1 0.62  1.00   0 0.98 0.07
heron      28 0.20 0.13 0.55 3.00 0.34 0.00 1.2 0.22  0.00   0 0.76 0.62 0 1
duck        4 0.29 0.18 0.16 1.30 0.36 0.22 4.5 0.24 -0.40  18 0.66 0.12 0 1
plover     12 0.25 0.19 0.02 0.80 0.26 0.05 1.4 0.28 -0.20   0 0.74 0.46 0 1
curlew     14 0.23 0.14 0.20 3.20 0.24 1.10 1.6 0.26 -0.20   0 0.72 0.58 0 1
hawk       54 0.24 0.18 0.02 0.80 0.46 0.55 2.2 0.60  0.05  -6 0.84 0.18
woodpecker 58 0.20 0.18 0.06 1.50 0.34 0.00 1.2 0.46 -0.60  -6 0.70 0.12
kingfisher 44 0.26 0.25 0.00 2.00 0.32 0.00 1.2 0.24 -0.10   0 0.62 0.07 0.6
crow       26 0.25 0.18 0.06 1.35 0.46 0.28 1.9 0.52 -0.20   0 0.82 0.24
dove       18 0.27 0.14 0.08 0.80 0.24 0.15 1.8 0.66 -0.35   0 0.72 0.12
parrot     56 0.23 0.20 0.02 0.75 0.58 0.75 2.6 0.88 -0.65  -6 0.74 0.10
quail      12 0.31 0.17 0.04 0.65 0.38 0.20 1.6 0.16 -0.20 -16 0.58 0.22 0.8
"""
BUILDS = {name: Build(*map(float, numbers)) for name, *numbers in map(str.split, _BUILDS.strip().splitlines())}

# Columns: the fields of Family, in their order; in the last two parts its species vary.
_FAMILIES = """
Tern         tern       silver slate  white  white  white  orange orange bar   crown
Sparrow      songbird   brown  umber  buff   cream  buff   slate  pink   crown belly
Warbler      warbler    olive  olive  yellow yellow yellow black  slate  eye   bar
Gull         gull       grey   grey   white  white  white  yellow yellow tail  beak
Jay          crested    blue   navy   silver white  blue   black  slate  tail  eye
Heron        heron      slate  slate  grey   white  silver yellow olive  crown beak
Woodpecker   woodpecker black  black  white  white  cream  slate  grey   bar   crown
Kingfisher   kingfisher teal   blue   orange white  teal   black  red    belly bar
Teal         duck       brown  umber  grey   rufous green  slate  orange eye   beak
Hawk         hawk       brown  brown  cream  white  brown  slate  yellow tail  belly
Plover       plover     buff   brown  white  white  buff   black  orange beak  bar
Parrot       parrot     green  green  yellow green  red    buff   grey   bar   tail
Finch        finch      red    umber  pink   red    red    buff   brown  bar   belly
Wren         wren       rufous brown  buff   cream  rufous brown  pink   tail  crown
Swallow      swallow    navy   navy   cream  rufous navy   black  black  belly tail
Crow         crow       black  black  black  slate  black  black  black  beak  eye
Dove         dove       grey   buff   pink   pink   grey   slate  red    bar   tail
Quail        quail      brown  umber  buff   slate  slate  black  olive  belly eye
Curlew       curlew     buff   brown  cream  buff   cream  umber  slate  crown tail
Oriole       songbird   black  black  orange orange black  slate  slate  bar   belly
Bunting      finch      navy   navy   blue   blue   blue   silver black  crown bar
Vireo        warbler    green  olive  white  cream  grey   slate  blue   eye   crown
Cardinal     crested    red    rufous red    red    red    orange brown  tail  bar
Egret        heron      white  white  white  white  white  yellow black  beak  crown
Flicker      woodpecker brown  umber  cream  cream  grey   slate  grey   belly tail
Eider        duck       white  black  black  cream  white  olive  olive  crown beak
Falcon       hawk       slate  slate  white  buff   slate  black  yellow bar   eye
Dotterel     plover     grey   slate  rufous white  white  black  yellow bar   crown
Lory         parrot     blue   green  red    red    blue   orange grey   eye   tail
Grosbeak     finch      black  black  white  red    black  cream  slate  beak  bar
Creeper      wren       umber  umber  white  white  umber  slate  slate  crown bar
Martin       swallow    violet umber  white  white  violet black  slate  tail  bar
Chough       crow       navy   black  navy   navy   navy   red    red    eye   beak
Pigeon       dove       white  slate  slate  teal   slate  pink   red    tail  beak
Thrush       songbird   olive  brown  white  cream  olive  yellow pink   belly crown
Ibis         curlew     violet teal   violet rufous rufous pink   red    beak  bar
Waxwing      crested    buff   slate  yellow buff   buff   black  black  bar   tail
Petrel       gull       black  umber  black  black  black  slate  pink   beak  eye
Kookaburra   kingfisher umber  teal   white  white  cream  slate  grey   crown tail
Redstart     warbler    slate  slate  orange orange slate  black  black  crown eye
"""
FAMILIES = tuple(
    Family(name, BUILDS[build], *looks, varies=(first, second))
    for name, build, *looks, first, second in map(str.split, _FAMILIES.strip().splitlines())
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


def _draw_all(settings: dict[str, int], root: Path, workers: int, progress: bool) -> list[tuple[str, BirdImage]]:
    total = settings["species"] * settings["images_per_species"]
    draw, drawn = partial(_draw_species, settings, root), []
    pool = ProcessPoolExecutor(workers) if workers > 1 and total >= FEW_IMAGES else nullcontext()
    with tqdm(total=total, desc="drawing birds", disable=not progress) as bar, pool:
        for images in getattr(pool, "map", map)(draw, range(settings["species"])):
            drawn += images
            bar.update(len(images))
    return drawn


def _write(settings: dict[str, int], root: Path, workers: int, progress: bool) -> None:
    """Writes the whole set into the new folder `root`."""
    (root / "images").mkdir(parents=True)
    (root / "parts").mkdir()
    drawn = list(enumerate(_draw_all(settings, root, workers, progress), 1))
    per_species, species = settings["images_per_species"], catalogue(settings["species"])
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


def _is_written(root: Path, settings: dict[str, int]) -> bool:
    """Whether `root` holds the set of these settings; raises FileExistsError if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = {name: json.loads((root / "birds.json").read_text())[name] for name in settings}
    except (OSError, ValueError, KeyError):
        found = "something else than a bird set"
    if found != settings:
        raise FileExistsError(f"{root} holds {found}, not {settings}: choose another folder, or remove this one first")
    return True


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

    The bytes depend on the arguments only, not on the number of workers. An interrupted run leaves no `root`.

    Args:
        root: folder to write; images.txt is directly inside it.
        species: number of species, 2 or more.
        images_per_species: number of images of each, 2 or more, every second of them for training.
        size: width and height of the images in pixels, 32 or more.
        seed: seed of poses, scenes and light; the species are always the same.
        workers: processes to draw with; None is as many as there are processors, and 0 or 1 is this process alone.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if an argument is out of range.
        FileExistsError: if `root` holds anything else than this very set.
    """
    catalogue(species)
    for name, value, least in (("images_per_species", images_per_species, 2), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be {least} or more, got {value}")
    settings = {"version": VERSION, "species": species, "images_per_species": images_per_species}
    root, settings = Path(root), settings | {"size": size, "seed": seed}
    if _is_written(root, settings):
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
