"""Batches of n_classes classes with n_samples images each, so that every image has company of its class."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler


class BalancedBatchSampler(Sampler[list[int]]):
    """Index lists for `DataLoader(batch_sampler=...)`: n_classes distinct classes x n_samples images.

    The classes of a batch are contiguous in it. Within a class, images are dealt out in random order until all were
    used, then shuffled anew; a class with fewer than n_samples images repeats them. Classes are dealt out in the same
    way, so that over an epoch all classes come up equally often, to within one. (The paper, section 4, draws classes
    at random for each batch.)

    An epoch's batches depend on `seed` and the epoch alone: call `set_epoch` before each. Under torch.distributed,
    each rank takes its own `n_classes / world_size` classes of each global batch.

    Args:
        labels: the class of each image of the data set: a sequence of ints, a tensor or an array.
        n_classes: classes in a global batch.
        n_samples: images of each.
        n_batches: batches in an epoch; None for the number of images // the global batch size, at least 1.
        seed: of the order.
        rank: of this process; None asks torch.distributed, and is 0 without it.
        world_size: number of processes; None likewise.

    Raises:
        ValueError: fewer classes than n_classes, n_classes not divisible by world_size, or a number out of range.

    Examples:
        >>> labels = [0, 0, 0, 1, 1, 2, 2, 2, 2]
        >>> sampler = BalancedBatchSampler(labels, n_classes=2, n_samples=2)
        >>> len(sampler)
        2
        >>> for batch in sampler:
        ...     a, b, c, d = (labels[i] for i in batch)
        ...     assert a == b != c == d
    """

    def __init__(
        self,
        labels: Sequence[int] | Tensor,
        n_classes: int = 30,
        n_samples: int = 4,
        *,
        n_batches: int | None = None,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        images: dict[int, list[int]] = {}
        for index, label in enumerate(torch.as_tensor(labels).tolist()):
            images.setdefault(label, []).append(index)
        self.images_of_class = dict(sorted(images.items()))
        self.n_classes, self.n_samples, self.seed = n_classes, n_samples, seed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            world_size = torch.distributed.get_world_size() if world_size is None else world_size
        self.rank, self.world_size = rank or 0, 1 if world_size is None else world_size
        self._check(n_batches)
        self.n_batches = n_batches if n_batches is not None else max(1, len(labels) // (n_classes * n_samples))
        self.epoch = 0
        self._start = 0  # batches of this epoch to leave out, as a resumed run has them behind it
        self._drawn = 0

    def __len__(self) -> int:
        """The number of batches that iteration yields: those left of the epoch, after `load_state_dict`."""
        return self.n_batches - self._start

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        share = self.n_classes // self.world_size
        self._drawn = 0
        for batch in self._epoch_batches():
            self._drawn += 1
            if self._drawn > start:
                mine = batch[self.rank * share : (self.rank + 1) * share]
                yield [index for images in mine for index in images]

    def set_epoch(self, epoch: int) -> None:
        """Take the batches of this epoch from the next iteration on; from its first, unless just resumed in it."""
        if epoch != self.epoch:
            self.epoch, self._start, self._drawn = epoch, 0, 0

    @property
    def sampler(self) -> "BalancedBatchSampler":
        """Itself: Lightning, and accelerate in some versions, call `set_epoch` of a batch sampler's `sampler` alone."""
        return self

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Where in the epoch we are, to go on from there.

        Args:
            batches_done: how many batches of the epoch the training has finished. Without it, as many as were drawn;
                that is too many under a DataLoader with workers, which draws ahead.
        """
        return {
            "epoch": self.epoch,
            "batches_done": self._drawn if batches_done is None else batches_done,
            **self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration yields what is left of that epoch.

        Raises:
            ValueError: the state is of a sampler with other settings, so its place would mean other images.
        """
        differences = [
            f"{name}: {state.get(name)!r} there, {value!r} here"
            for name, value in self._settings().items()
            if state.get(name) != value
        ]
        if differences:
            raise ValueError(f"this state is of a sampler with other settings: {'; '.join(differences)}")
        if not 0 <= state["batches_done"] <= self.n_batches:
            raise ValueError(f"batches_done must be in [0, {self.n_batches}], got {state['batches_done']}")
        self.epoch, self._start, self._drawn = state["epoch"], state["batches_done"], state["batches_done"]

    def _settings(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "n_classes": self.n_classes,
            "n_samples": self.n_samples,
            "n_batches": self.n_batches,
            "n_images": sum(map(len, self.images_of_class.values())),
            "n_labels": len(self.images_of_class),
        }

    def _epoch_batches(self) -> Iterator[list[list[int]]]:
        """All ranks' batches of the epoch: for each of n_classes classes its n_samples images."""
        rng = random.Random(f"{self.seed} {self.epoch}")
        classes = _Dealer(list(self.images_of_class), rng)
        images = {label: _Dealer(indices, rng) for label, indices in self.images_of_class.items()}
        for _ in range(self.n_batches):
            yield [images[label].deal(self.n_samples) for label in classes.deal(self.n_classes)]

    def _check(self, n_batches: int | None) -> None:
        for name in ("n_classes", "n_samples", "world_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if n_batches is not None and n_batches < 1:
            raise ValueError(f"n_batches must be at least 1, got {n_batches}")
        if self.n_classes > len(self.images_of_class):
            raise ValueError(
                f"cannot draw n_classes={self.n_classes} classes for a batch: labels have {len(self.images_of_class)}"
            )
        if self.n_classes % self.world_size or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"n_classes={self.n_classes} must be divisible by world_size={self.world_size}, "
                f"and rank={self.rank} in [0, {self.world_size})"
            )


class _Dealer:
    """Deals items in random order; when all are dealt, shuffles them and goes on."""

    def __init__(self, items: list[int], rng: random.Random) -> None:
        self.items, self.rng = items, rng
        self.left: list[int] = []

    def deal(self, count: int) -> list[int]:
        """The next `count` items; all different, unless there are fewer than that."""
        dealt: list[int] = []
        while len(dealt) < count:
            if not self.left:
                self.left = self.rng.sample(self.items, len(self.items))
                # What this hand holds already comes up last in the new round, so that no hand has an item twice.
                self.left.sort(key=lambda item: item not in dealt)
            dealt.append(self.left.pop())
        return dealt
