"""Images for a DataLoader: transforms, caching, and crops that depend on seed, epoch and position in the epoch only.

So a run that resumes within an epoch sees the same crops, whatever the number of workers and processes.
"""

import atexit
import hashlib
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from apinet_head import BalancedBatchSampler
from workbench.datasets.lists import Image
from workbench.image_files import load_image


class ImageDataset(Dataset[tuple[Any, int, int]]):
    """(transformed image, label, index) triples.

    With `resize`, images are resized to a square before the transform; with the transform's own `squash` as size, this
    changes nothing. With `cache`, each worker keeps the decoded and resized images in memory.
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


# Not timm.data.create_transform: for training, it lacks the published resize to a square and random crop. For testing,
# its crop_mode="squash" takes the ratio crop / resize and rounds: 144 of 224 would be 144 of 223.
def train_transform(config: Mapping[str, Any]) -> transforms.Compose:
    """Squash to a square, take crop x crop pixels of that at random, mirrored or not, and normalise."""
    return _squashed(config, transforms.RandomCrop(config["crop"]), transforms.RandomHorizontalFlip())


def eval_transform(config: Mapping[str, Any]) -> transforms.Compose:
    """What a model folder's classes.json says: squash and take the centre, or else arguments of timm."""
    if "squash" in config:
        return _squashed(config, transforms.CenterCrop(config["crop"]))
    return create_transform(**config)


def _squashed(config: Mapping[str, Any], *steps: Any) -> transforms.Compose:
    size, crop = config["squash"], config["crop"]
    if not 0 < crop <= size:  # CenterCrop would pad with black
        raise ValueError(f"crop must be in [1, squash], got crop={crop} and squash={size}")
    normalize = transforms.Normalize(config["mean"], config["std"])
    return transforms.Compose([transforms.Resize((size, size)), *steps, transforms.ToTensor(), normalize])


def to_device(inputs: Tensor, device: torch.device) -> Tensor:
    """Images in the layout that convolutions like, or features."""
    layout = torch.channels_last if inputs.ndim == 4 else torch.preserve_format
    return inputs.to(device, non_blocking=True, memory_format=layout)


def unnormalized(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Images [...,3,H,W] as they were before they were normalised, in [0, 1]."""
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (images.cpu() * std + mean).clamp(0, 1)


def train_loader(
    images: ImageDataset, sampler: BalancedBatchSampler, device: torch.device, workers: int, timeout: float = 0
) -> DataLoader[Any]:
    """The sampler's batches; each position in an epoch has its own random crop."""
    return DataLoader(
        AugmentedImages(images), batch_sampler=PlacedBatches(sampler), num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, timeout=timeout if workers else 0,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator(),  # else each iteration of the loader draws from the global generator
    )  # fmt: skip


def eval_loader(
    images: Sequence[Image], config: Mapping[str, Any], batch: int, workers: int, timeout: float, cache: bool = False
) -> DataLoader[Any]:
    """This process's share of the images, in order, prepared as a model folder's classes.json says."""
    with PartialState().split_between_processes(list(images)) as mine:
        dataset = ImageDataset(mine, eval_transform(config), resize=config.get("squash"), cache=cache)
    return DataLoader(dataset, batch_size=batch, num_workers=workers, timeout=timeout if workers else 0)


class PlacedBatches:
    """The sampler's batches, as (index, seed) pairs for `AugmentedImages`: each position in the epoch has its own seed.

    An image that occurs twice in an epoch is cropped in two ways.
    """

    def __init__(self, sampler: BalancedBatchSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.sampler
        for number, batch in enumerate(sampler, start=sampler.n_batches - len(sampler)):
            first = (number * sampler.world_size + sampler.rank) * len(batch)
            # Hashes, as torch's generator uses 32 bits of a seed, and sums of the three would collide.
            texts = [f"{sampler.seed} {sampler.epoch} {first + place}" for place in range(len(batch))]
            seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in texts]
            yield list(zip(batch, seeds, strict=True))


class AugmentedImages(Dataset[Any]):
    """The images' items by (index, seed): the generators that transforms use are seeded for each item."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __getitem__(self, place: tuple[int, int]) -> Any:
        index, seed = place
        before = random.getstate()  # timm's transforms use this generator, torchvision's that of torch
        try:
            with torch.random.fork_rng(devices=[]):
                random.seed(seed)
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
                return self.images[index]
        finally:
            random.setstate(before)


def leave_signals_to_the_parent(_: int) -> None:
    """For workers: a signal to the process group must not end them before the parent has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers_with_the_parent() -> None:
    """After an error, multiprocessing would wait at exit for workers, which ignore SIGTERM: kill them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises an error for each killed worker
    for worker in multiprocessing.active_children():
        worker.kill()
