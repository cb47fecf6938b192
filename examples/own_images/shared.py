"""What examples/cub has that serves here as well: its opener and check of image files, and its reproducible crops."""

import sys
from pathlib import Path

# Behind this folder, whose names go first: both have a train.py.
sys.path.append(str(Path(__file__).resolve().parents[1] / "cub"))

from augmentation import AugmentedImages, PlacedBatches
from bad_images import shown
from check import find_bad, processors
from image_files import BadImageError, load_image

__all__ = ["AugmentedImages", "BadImageError", "PlacedBatches", "find_bad", "load_image", "processors", "shown"]
