"""Readers of the paper's five data sets, each from the folder that unpacking the official archive gives.

A reader takes the folder and returns an `ImageSet`. Anything missing or inconsistent is an error that names it; with
`complete=False`, images may be missing.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench import shown
from workbench.datasets.bad_images import leave_out
from workbench.datasets.bird_lists import CUB, NABIRDS, read_cub, read_nabirds
from workbench.datasets.lists import Archive, Image, ImageSet
from workbench.datasets.other_lists import AIRCRAFT, CARS, DOGS, read_aircraft, read_cars, read_dogs

if TYPE_CHECKING:
    from workbench.settings import Settings

__all__ = ["ARCHIVES", "READERS", "Archive", "Image", "ImageSet", "open_data", "read"]

# By the value of --dataset.
READERS = {"cub": read_cub, "cars": read_cars, "aircraft": read_aircraft, "dogs": read_dogs, "nabirds": read_nabirds}
ARCHIVES = {"cub": CUB, "cars": CARS, "aircraft": AIRCRAFT, "dogs": DOGS, "nabirds": NABIRDS}


def read(dataset: str, root: str | Path, *, complete: bool = True) -> ImageSet:
    """Read a data set; errors end the command."""
    try:
        return READERS[dataset](root, complete=complete)
    except (OSError, ValueError) as error:
        raise SystemExit(shown(str(error))) from None


def open_data(settings: "Settings", root: str | None = None) -> ImageSet:
    """The images at `root`, or else those of the settings, without the bad ones of --skip-bad."""
    root = root or settings.data
    if root:
        data = read(settings.dataset, root, complete=not settings.skip_bad)
        return leave_out(data, Path(settings.skip_bad), Path(root), settings.n_samples) if settings.skip_bad else data
    from birds.dataset import VERSION, write_birds  # here, as only the demo needs them

    species, images, size = settings.species, settings.images_per_species, settings.image_size
    folder = cache_folder() / f"birds-v{VERSION}-{species}x{images}-{size}px"
    if not folder.exists():
        print(f"No --data given: drawing the embedded birds into {folder} (kept for the next run)", flush=True)
    write_birds(folder, species=species, images_per_species=images, size=size)
    return replace(read_cub(folder), name="embedded birds")


def cache_folder() -> Path:
    """The user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apinet-head"
