"""A tiny CUB-200-2011 in the official format, for the tests of its reader and of what is built on it."""

from pathlib import Path

import numpy as np
import PIL.Image

# Ids neither contiguous nor sorted; class ids sort as numbers (3 < 20), not as text; a file name has a space.
LISTS = {
    "images.txt": "30 003.Sooty_Albatross/b.jpg\n2 003.Sooty_Albatross/a.jpg\n7 020.Great_Auk/Auk 2.jpg\n"
    "4 020.Great_Auk/Auk_1.jpg\n",
    "image_class_labels.txt": "2 3\n7 20\n4 20\n30 3\n",
    "train_test_split.txt": "30 1\n4 0\n2 0\n7 1\n",
    "classes.txt": "20 020.Great_Auk\n3 003.Sooty_Albatross\n",
}
PATHS = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in LISTS["images.txt"].splitlines()}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write_cub(root: Path) -> Path:
    """Two classes with two images each."""
    root.mkdir(parents=True)
    for name, text in LISTS.items():
        (root / name).write_text(text)
    for seed, name in enumerate(PATHS.values()):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noise(20 + seed, 30, 3, seed=seed)).save(root / "images" / name)
    return root
