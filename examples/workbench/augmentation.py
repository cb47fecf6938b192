"""Chance in the images, tied to their place: a crop depends on the seed, the epoch and the place in the epoch alone.

So a run that goes on in the middle of an epoch sees what it would have seen, however many workers load the images, and
each of several processes sees what one process would see there.
"""

import atexit
import hashlib
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from apinet_head import BalancedBatchSampler


class PlacedBatches(Sampler[list[tuple[int, int]]]):
    """The sampler's batches, as (index, seed) pairs for `AugmentedImages`: each place in the epoch has its own seed.

    A place, not an image: an image that comes twice in an epoch is to be cropped in two ways.
    """

    def __init__(self, sampler: BalancedBatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        sampler = self.sampler
        for number, batch in enumerate(sampler, start=sampler.n_batches - len(sampler)):
            first = (number * sampler.world_size + sampler.rank) * len(batch)
            yield [(index, self._seed(first + place)) for place, index in enumerate(batch)]

    def _seed(self, place: int) -> int:
        # A hash, for torch's generator takes 32 bits of a seed, and sums of the three would meet each other.
        text = f"{self.sampler.seed} {self.sampler.epoch} {place}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


class AugmentedImages(Dataset[Any]):
    """The images' items by (index, seed): transforms draw from torch's generator, seeded for that item alone."""

    def __init__(self, images: Dataset[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, place: tuple[int, int]) -> Any:
        index, seed = place
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
            return self.images[index]


def leave_signals_to_the_parent(_: int) -> None:
    """For workers: a signal to the whole group must not end them before the parent has finished its step and saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def end_workers_with_the_parent() -> None:
    """An error leaves workers behind, which multiprocessing would wait for at exit: they don't hear its SIGTERM."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error about each worker that is killed
    for worker in multiprocessing.active_children():
        worker.kill()
