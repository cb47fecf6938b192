"""The data that a run asks for: a folder, or the embedded birds, drawn once and kept in the user's cache."""

import os
from dataclasses import replace
from pathlib import Path

from birds import VERSION, write_birds
from workbench.datasets import READERS, ImageSet, read_cub
from workbench.datasets.bad_images import leave_out
from workbench.settings import Settings


def open_data(settings: Settings, root: str | None = None) -> ImageSet:
    """The images at `root`, or else those that the settings name, less the bad ones that they leave out.

    Says so when it draws birds, and how many images it leaves out.
    """
    root = root or settings.data
    if root and settings.skip_bad:
        data = READERS[settings.dataset](root, complete=False)
        return leave_out(data, Path(settings.skip_bad), Path(root), settings.n_samples)
    if root:
        return READERS[settings.dataset](root)
    folder = cache_folder() / (
        f"birds-v{VERSION}-{settings.species}x{settings.images_per_species}-{settings.image_size}px"
    )
    if not folder.exists():
        print(f"No --data given: drawing the embedded birds into {folder} (kept for the next run)", flush=True)
    write_birds(
        folder,
        species=settings.species,
        images_per_species=settings.images_per_species,
        size=settings.image_size,
    )
    return replace(read_cub(folder), name="embedded birds")


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apinet-head"
