"""What the loops here share: drawn shapes with labels, the same in every run, and the flags --backbone and --epochs."""

import argparse
import difflib
import random
from collections.abc import Callable
from typing import Any

import timm
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

CLASSES = [f"{colour} {shape}" for colour in ("red", "blue") for shape in ("disc", "square", "triangle")]
SIZE = 48


class Shapes(Dataset[tuple[Any, int]]):
    """(transformed picture, label) pairs, 20 of each class; other pictures for testing than for training.

    `targets`, the labels, and `classes` are named as in the data sets of torchvision.
    """

    classes = CLASSES

    def __init__(self, train: bool, transform: Callable[[Image.Image], Any] = to_tensor) -> None:
        self.transform = transform
        self.targets = [label for label in range(len(CLASSES)) for _ in range(20)]
        self.pictures = [draw(label, random.Random(f"{train} {place}")) for place, label in enumerate(self.targets)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.pictures[index]), self.targets[index]


def draw(label: int, rng: random.Random) -> Image.Image:
    """One of the class, anywhere on a grey ground and of any size."""
    picture = Image.new("RGB", (SIZE, SIZE), (rng.randint(60, 190),) * 3)
    radius = rng.randint(SIZE // 6, SIZE // 4)
    x, y = (rng.randint(radius, SIZE - radius) for _ in range(2))
    strong, weak = rng.randint(180, 250), rng.randint(0, 60)
    fill = (strong, weak, weak) if label < 3 else (weak, weak, strong)
    box = (x - radius, y - radius, x + radius, y + radius)
    pen = ImageDraw.Draw(picture)
    if label % 3 == 0:
        pen.ellipse(box, fill)
    elif label % 3 == 1:
        pen.rectangle(box, fill)
    else:
        pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill)
    return picture


@torch.no_grad()
def accuracy_on(images: Dataset[tuple[Any, int]], net: nn.Module, device: str) -> float:
    """The share of the images that the net, put in eval mode, gives their class."""
    net.eval()
    correct = [net(batch.to(device)).argmax(1).cpu() == labels for batch, labels in DataLoader(images, batch_size=32)]
    return torch.cat(correct).float().mean().item()


def make_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser of the flags that all loops have; a mistake in one is a line, with near names of models."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    about_backbone = "any timm model name (default: %(default)s)"
    parser.add_argument("--backbone", type=_model, default="test_resnet", help=about_backbone)
    parser.add_argument("--epochs", type=_count, default=20, help="default: %(default)s")
    return parser


def _model(name: str) -> str:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:5] or difflib.get_close_matches(name, timm.list_models(), 5)
        raise argparse.ArgumentTypeError(f"timm has no model {name}" + (f"; near: {', '.join(near)}" if near else ""))
    return name


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}")
    return int(text)
