"""A trained net on its test images: features, predictions, and for each image the one to compare it with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from birds.dataset import differing_parts, read_places, read_species
from workbench import model_folder
from workbench.datasets import open_data
from workbench.datasets.bad_images import ending_at_bad_images
from workbench.datasets.lists import Image, ImageSet
from workbench.image_files import load_image
from workbench.images import eval_loader
from workbench.metrics import predict
from workbench.model_folder import Model
from workbench.settings import Settings

Place = tuple[float, float]


class Outcome(NamedTuple):
    """A model of train_cub.py and its N test images, in order; tensors are on the CPU."""

    model: Model
    settings: Settings
    data: ImageSet
    features: Tensor  # [N,D]
    logits: Tensor  # [N,C]
    labels: Tensor  # [N]


def open_run(folder: Path, root: str | None) -> tuple[Model, Settings, ImageSet, DataLoader[Any]]:
    """A model of train_cub.py, its run's settings, its data (or that at `root`), and this process's test images."""
    model = model_folder.load(folder)
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder}: no model folder of train_cub.py, such as RUN/best: {error}") from None
    settings = Settings(**about["settings"])
    data = open_data(settings, root)
    if data.classes != model.classes:
        raise SystemExit(f"{data.name} has other classes than {folder} was trained on: give its --data")
    loading = settings.eval_batch, settings.workers, settings.loader_timeout
    return model, settings, data, eval_loader(data.test, model.transform, *loading)


@torch.no_grad()
def run_tests(folder: Path, root: str | None, device: torch.device) -> Outcome:
    """A model in eval mode, on the device, and its outputs on the test images; folder and data as for `open_run`."""
    model, settings, data, tests = open_run(folder, root)
    net = model.net.to(device)
    with ending_at_bad_images():
        features, labels = predict(net.backbone, tests, device)
    return Outcome(model, settings, data, features, net.head(features.to(device)).float().cpu(), labels)


def nearest(features: Tensor, queries: Tensor, allowed: Tensor) -> Tensor:
    """For each of `queries` [Q], rows of `features` [N,D], the nearest row that `allowed` [Q,N] has; -1 if none."""
    distances = torch.cdist(features[queries], features).masked_fill(~allowed, torch.inf)
    return distances.argmin(1).where(allowed.any(1), -1)


class BirdMarks:
    """Where two of the embedded birds differ, in the pixels of the image that the net sees."""

    def __init__(self, data: ImageSet, transform: dict[str, int]) -> None:
        root = data.test[0].path.parents[2]
        self.species = read_species(root)
        self.classes, self.squash, self.crop = data.classes, transform["squash"], transform["crop"]
        self.boxes, self.parts = read_places(root)
        self.size = load_image(data.test[0].path).width  # all are square, and of one size

    @classmethod
    def of(cls, data: ImageSet, transform: dict[str, int]) -> "BirdMarks | None":
        """None for photographs, whose differences are not annotated."""
        try:
            return cls(data, transform)
        except FileNotFoundError:
            return None

    def differing(self, image: Image, other: Image) -> list[Place]:
        """The visible parts of `image` in which its species differs from the other's, if both are of one family."""
        mine, theirs = (self.species[self.classes[each.label]] for each in (image, other))
        if mine.family.name != theirs.family.name:
            return []
        visible = self.parts[int(image.image_id)]
        places = [self._in_crop(*visible[part]) for part in sorted(differing_parts(mine, theirs)) if part in visible]
        return [(x, y) for x, y in places if min(x, y) >= 0 and max(x, y) < self.crop]

    def box(self, image: Image) -> tuple[float, float, float, float]:
        """The bird's box as (left, top, right, bottom); it may reach beyond the crop."""
        x, y, width, height = self.boxes[int(image.image_id)]
        return *self._in_crop(x, y), *self._in_crop(x + width, y + height)

    def _in_crop(self, x: float, y: float) -> Place:
        # As images.eval_transform does it: squash to a square (the birds are square), then the central crop.
        scale, edge = self.squash / self.size, (self.squash - self.crop) / 2
        return x * scale - edge, y * scale - edge
