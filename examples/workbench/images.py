"""The images of a data set for a DataLoader: transforms, caching. What the readers and the opener give is here too."""

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
from timm.data import IMAGENET_DEFAULT_STD as STD
from torch.utils.data import Dataset
from torchvision import transforms

from workbench.datasets.common import Image, ImageSet
from workbench.datasets.cub import family, read_boxes, read_cub, read_parts
from workbench.image_files import load_image

__all__ = [
    "Image", "ImageDataset", "ImageSet", "family", "load_image", "read_boxes", "read_cub", "read_parts",
    "test_transform", "train_transform",
]  # fmt: skip
Stats = Sequence[float]


class ImageDataset(Dataset[tuple[Any, int, int]]):
    """(transformed image, label, index) triples.

    Args:
        images: `train` or `test` of an `ImageSet`.
        transform: of a PIL image, such as `train_transform(...)`.
        resize: squash images to resize x resize before the transform. Given the transform's own `resize`, items are
            the same as without, and a cache holds small pictures.
        cache: keep decoded (and resized) images in memory from their first use on. Each worker process of a
            DataLoader has its own cache, so keep workers alive with `persistent_workers=True`, or have none.
    """

    def __init__(
        self, images: Sequence[Image], transform: Callable[..., Any], *, resize: int | None = None, cache: bool = False
    ) -> None:
        self.images, self.transform, self.cache = list(images), transform, cache
        self.labels = [image.label for image in self.images]
        self._squash = transforms.Compose([transforms.Resize((resize, resize))] if resize is not None else [])
        self._pictures: dict[int, PIL.Image.Image] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        picture = self._pictures.get(index)
        if picture is None:
            picture = self._squash(load_image(self.images[index].path))
            if self.cache:
                self._pictures[index] = picture
        return self.transform(picture), self.labels[index], index


# Not timm.data.create_transform: for training, it has no squash + random crop, which is what was published. For
# testing, its crop_mode="squash" is the same, but takes crop / resize and rounds: 144 of 224 would be 144 of 223.
def train_transform(resize: int, crop: int, *, mean: Stats = MEAN, std: Stats = STD) -> transforms.Compose:
    """Squash to resize x resize, take crop x crop pixels of that at random, mirrored or not, and normalise."""
    return _transform(resize, crop, [transforms.RandomCrop(crop), transforms.RandomHorizontalFlip()], mean, std)


def test_transform(resize: int, crop: int, *, mean: Stats = MEAN, std: Stats = STD) -> transforms.Compose:  # noqa: PT028
    """Squash to resize x resize, take the central crop x crop pixels of that, and normalise."""
    return _transform(resize, crop, [transforms.CenterCrop(crop)], mean, std)


test_transform.__test__ = False  # type: ignore[attr-defined]  # else pytest runs it where a test imports it


def _transform(resize: int, crop: int, steps: list[Any], mean: Stats, std: Stats) -> transforms.Compose:
    if not 0 < crop <= resize:  # CenterCrop would pad with black
        raise ValueError(f"crop must be in [1, resize], got crop={crop} and resize={resize}")
    steps = [transforms.Resize((resize, resize)), *steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose(steps)
