"""FGVC-Aircraft: 100 variants; a family is what its makers call one, such as Boeing 737.

Not torchvision's `FGVCAircraft`: it takes paths out of the folder, and names no line of what is wrong.
"""

from pathlib import Path, PurePosixPath

from workbench.datasets import lists
from workbench.datasets.lists import Archive, ImageSet, Inside, read_lines

VARIANTS, TRAIN, TEST = "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"
FAMILIES = "images_family_trainval.txt"
AIRCRAFT = Archive(
    "FGVC-Aircraft",
    expected="fgvc-aircraft-2013b, its folder data, or the folder it was unpacked in",
    images="images/",
    source="FGVC-Aircraft is available from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    folders=("data", "fgvc-aircraft-2013b/data"),
)


def read_aircraft(root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read FGVC-Aircraft by variants, trained on its training and validation images; errors are as in `read_cub`.

    `root` is the folder fgvc-aircraft-2013b, its folder data, or the one that it was unpacked in. Images come in the
    order of the lists, classes in that of variants.txt.
    """
    root, variants, train, test, families = AIRCRAFT.find(root, VARIANTS, TRAIN, TEST, FAMILIES)
    label_of = {name: label for label, name in enumerate(read_lines(variants, "<variant>", lambda name: (name, None)))}
    listed = {file: _read_names(file, "<variant>") for file in (train, test)}
    family_of = _families(train, listed[train], families)
    lists.check_apart(train, listed[train], test, listed[test])
    lists.check_trained(train, listed[train].values(), variants, label_of, "variant")
    parts = []
    for file, names in listed.items():
        lists.check_known(file, names.values(), variants, label_of, "variant")
        rows = {image_id: (PurePosixPath(f"{image_id}.jpg"), label_of[name]) for image_id, name in names.items()}
        parts.append(AIRCRAFT.images_at(root / "images", rows, file, complete=complete))
    return ImageSet(AIRCRAFT.name, list(label_of), *parts, families=[family_of[name] for name in label_of])


def _read_names(file: Path, column: str) -> dict[str, str]:
    """{image id: name}; the ids are text, for some begin with 0."""
    inside = Inside(file.parent, "images")

    def parse(image_id: str, name: str) -> tuple[str, str]:
        inside(f"{image_id}.jpg")
        return image_id, name

    return read_lines(file, f"<image_id> {column}", parse)


def _families(train: Path, variants: dict[str, str], file: Path) -> dict[str, str]:
    """{variant: family}, from the variant and the family of each training image."""
    families = _read_names(file, "<family>")
    lists.check_ids(train, variants, file, families)
    family_of: dict[str, str] = {}
    for image_id, variant in variants.items():
        found = family_of.setdefault(variant, families[image_id])
        if found != families[image_id]:
            both = f"{found} and {families[image_id]}"
            raise ValueError(f"{file} puts images of {variant} ({train}) into {both}; unpack the archive anew")
    return family_of
