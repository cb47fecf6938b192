"""A trained net before its test images: features, predictions, and for each image the one to compare it with."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from apinet_head import APINet
from birds import Species, differing_parts, read_species
from score import test_loader
from workbench.datasets.birds_cache import open_data
from workbench.images import Image, ImageSet, load_image, read_boxes, read_parts
from workbench.run_folder import load_model
from workbench.settings import Settings

Place = tuple[float, float]


class Outcome(NamedTuple):
    """A net and its N test images, in order; tensors are on the CPU."""

    net: APINet
    settings: Settings
    data: ImageSet
    features: Tensor  # [N,D]
    logits: Tensor  # [N,C]
    labels: Tensor  # [N]

    def images(self, *indices: int) -> Tensor:
        """Some test images as the net sees them, stacked."""
        return torch.stack([test_loader(self.data, self.settings).dataset[index][0] for index in indices])


@torch.no_grad()
def run_tests(model: Path, root: str | None, device: torch.device) -> Outcome:
    """The net of a model folder, in eval mode, and what it makes of its test images (of the data at `root`, if given).

    Raises:
        SystemExit: the data has other classes than the net.
    """
    net, run = load_model(model)
    net = net.to(device).eval()
    settings = Settings(**run["settings"])
    data = open_data(settings, root)
    if data.classes != run["classes"]:
        raise SystemExit(f"{data.name} has other classes than {model} was trained on: give its --data")
    features, labels = [], []
    for images, targets, _ in tqdm(test_loader(data, settings), desc="features", leave=False):
        features.append(net.backbone(images.to(device)).float())
        labels.append(targets)
    every = torch.cat(features)
    return Outcome(net, settings, data, every.cpu(), net.head(every).float().cpu(), torch.cat(labels))


def nearest(features: Tensor, queries: Tensor, allowed: Tensor) -> Tensor:
    """For each of `queries` [Q], rows of `features` [N,D], the nearest row that `allowed` [Q,N] has; -1 if none."""
    distances = torch.cdist(features[queries], features).masked_fill(~allowed, torch.inf)
    return distances.argmin(1).where(allowed.any(1), -1)


class BirdMarks:
    """Where two of the embedded birds differ, in the pixels of the image that the net sees.

    Raises:
        FileNotFoundError: `data` isn't the embedded birds, so that nobody knows what makes its species differ.
    """

    def __init__(self, data: ImageSet, settings: Settings) -> None:
        root = data.test[0].path.parents[2]
        self.species: dict[str, Species] = read_species(root)
        self.classes, self.settings = data.classes, settings
        self.boxes, self.parts = read_boxes(root), read_parts(root)[1]
        self.size = load_image(data.test[0].path).width  # all are square, and of one size

    def differing(self, image: Image, other: Image) -> list[Place]:
        """The parts of `image` in which its species differs from the other's, if it is of the same family.

        Parts that are hidden, or outside the crop, are left out.
        """
        mine, theirs = (self.species[self.classes[each.label]] for each in (image, other))
        if mine.family.name != theirs.family.name:
            return []
        visible = self.parts[int(image.image_id)]
        places = [self._in_crop(*visible[part]) for part in sorted(differing_parts(mine, theirs)) if part in visible]
        return [(x, y) for x, y in places if min(x, y) >= 0 and max(x, y) < self.settings.crop]

    def box(self, image: Image) -> tuple[float, float, float, float]:
        """The bird's box as (left, top, right, bottom); it may reach beyond the crop."""
        x, y, width, height = self.boxes[int(image.image_id)]
        return *self._in_crop(x, y), *self._in_crop(x + width, y + height)

    def _in_crop(self, x: float, y: float) -> Place:
        # As data.test_transform does it: squash to resize x resize (the birds are square), then the central crop.
        scale, edge = self.settings.resize / self.size, (self.settings.resize - self.settings.crop) / 2
        return x * scale - edge, y * scale - edge
