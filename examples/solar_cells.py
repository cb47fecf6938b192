"""Photographs of solar cells as class folders: python examples/solar_cells.py DIR

The 2,624 electroluminescence images of the ELPV data set (Deitsch et al., "Segmentation of photovoltaic module cells in
uncalibrated electroluminescence images", 2021; Buerhop-Lutz et al., "A benchmark for visual identification of defective
solar cells in electroluminescence imagery", 2018). They come with the package elpv-dataset: pip install '.[elpv]'.
Their licence is CC BY-NC-SA 4.0: no commercial use, and what is made from them, models included, must be shared under
the same licence. This repository contains none of them.

Experts gave each cell a probability of being defective, 0, 1/3, 2/3 or 1, by how certain they were. There are cells of
monocrystalline and of polycrystalline silicon, which look different. The four classes are functional (0 and 1/3) and
defective (2/3 and 1) cells of either silicon. With --degrees, each probability is a class, eight in all.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image

from workbench import Command, writing

DEGREES = ("functional", "possibly-defective", "probably-defective", "defective")  # 0, 1/3, 2/3, 1


def write_folders(folder: Path, images: Any, probabilities: Any, kinds: Any, degrees: bool = False) -> Counter[str]:
    """A PNG for each of the grey images [N,H,W], in the folder of its class; how many each class has."""
    counts: Counter[str] = Counter()
    for number, (image, probability, kind) in enumerate(zip(images, probabilities, kinds, strict=True), 1):
        thirds = round(3 * float(probability))
        if abs(3 * probability - thirds) > 0.05 or not 0 <= thirds <= 3:
            raise ValueError(f"the probability of a defect must be 0, 1/3, 2/3 or 1, got {probability}")
        name = f"{kind}-{DEGREES[thirds if degrees else 3 * (thirds // 2)]}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(folder / name / f"cell{number:04d}.png")
        counts[name] += 1
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = Command(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="new folder for the class folders")
    parser.add_argument("--degrees", action="store_true", help="eight classes instead of four")
    options = parser.parse_args(arguments)
    if options.folder.exists() and (not options.folder.is_dir() or any(options.folder.iterdir())):
        raise SystemExit(f"{options.folder} exists already: choose another folder")
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise SystemExit("the photographs come with a package: pip install '.[elpv]'") from None
    with writing("", options.folder):  # the disk may be full, or read-only
        counts = write_folders(options.folder, *load_dataset(), degrees=options.degrees)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    print(f"{counts.total()} images in {options.folder}; licence of the images: CC BY-NC-SA 4.0")


if __name__ == "__main__":
    main()
