"""Readers of the paper's five data sets, each from the folder that unpacking the official archive gives.

A reader takes the folder and returns an `ImageSet`. What is missing or doesn't fit together is an error that names it;
with `complete=False`, images may be missing.
"""

from collections.abc import Callable

from workbench.datasets.aircraft import AIRCRAFT, read_aircraft
from workbench.datasets.cars import CARS, read_cars
from workbench.datasets.common import Archive, ImageSet
from workbench.datasets.cub import CUB, read_cub
from workbench.datasets.dogs import DOGS, read_dogs
from workbench.datasets.nabirds import NABIRDS, read_nabirds

# By the value of --dataset.
READERS: dict[str, Callable[..., ImageSet]] = {
    "cub": read_cub,
    "cars": read_cars,
    "aircraft": read_aircraft,
    "dogs": read_dogs,
    "nabirds": read_nabirds,
}
ARCHIVES: dict[str, Archive] = {"cub": CUB, "cars": CARS, "aircraft": AIRCRAFT, "dogs": DOGS, "nabirds": NABIRDS}
