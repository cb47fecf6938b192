"""Batches of n_classes classes with n_samples images each, so that every image has company of its class."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from apinet_head._checks import check_int, check_integer, shown


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
        ValueError: labels are not of an integer dtype, fewer classes than n_classes, n_classes not divisible by
            world_size, or a number out of range.
        TypeError: a number is no int.

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
        for index, label in enumerate(_as_ints(labels)):
            images.setdefault(label, []).append(index)
        self.images_of_class: dict[int, list[int]] = dict(sorted(images.items()))
        self.n_classes: int = n_classes
        self.n_samples: int = n_samples
        self.seed: int = seed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            world_size = torch.distributed.get_world_size() if world_size is None else world_size
        self.rank: int = 0 if rank is None else rank
        self.world_size: int = 1 if world_size is None else world_size
        self._check(n_batches)
        count = sum(map(len, images.values()))
        self.n_batches: int = n_batches if n_batches is not None else max(1, count // (n_classes * n_samples))
        self.epoch: int = 0
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
        check_int(epoch, "epoch", 0)
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

        Raises:
            ValueError: the epoch has not that many batches.
        """
        done = self._drawn if batches_done is None else batches_done
        self._check_done(done)
        return {"epoch": self.epoch, "batches_done": done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next iteration yields what is left of that epoch.

        Raises:
            ValueError: it is no state, or that of a sampler with other settings, where its place means other images.
            TypeError: it is no dict, or what it says no int.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of a sampler is a dict, got {type(state).__name__}")
        names = ("epoch", "batches_done", *self._settings())
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"no state of a sampler: without {', '.join(missing)}, got {shown(dict(state))}")
        for name in names:
            check_int(state[name], name)
        differences = [
            f"{name}: {state[name]!r} there, {value!r} here"
            for name, value in self._settings().items()
            if state[name] != value
        ]
        if differences:
            raise ValueError(f"this state is of a sampler with other settings: {'; '.join(differences)}")
        check_int(state["epoch"], "epoch", 0)
        self._check_done(state["batches_done"])
        self.epoch, self._start, self._drawn = state["epoch"], state["batches_done"], state["batches_done"]

    def _check_done(self, batches_done: int) -> None:
        check_int(batches_done, "batches_done")
        if not 0 <= batches_done <= self.n_batches:
            raise ValueError(f"batches_done must be in [0, {self.n_batches}], got {batches_done}")

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
            check_int(getattr(self, name), name, 1)
        for name in ("rank", "seed"):
            check_int(getattr(self, name), name)
        if n_batches is not None:
            check_int(n_batches, "n_batches", 1)
        if self.n_classes > len(self.images_of_class):
            raise ValueError(
                f"cannot draw n_classes={self.n_classes} classes for a batch: labels have {len(self.images_of_class)}"
            )
        if self.n_classes % self.world_size or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"n_classes={self.n_classes} must be divisible by world_size={self.world_size}, "
                f"and rank={self.rank} in [0, {self.world_size})"
            )


def _as_ints(labels: Sequence[int] | Tensor) -> list[int]:
    """The labels as ints of Python, each of which is one key of a dict, as NaN and most objects are not."""
    try:
        found = torch.as_tensor(labels)
        ints: list[int] = found.tolist()
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises any of them
        raise ValueError(f"labels must be ints, or a tensor or array of them, got {shown(labels)}") from error
    if found.numel():  # of no labels at all, the dtype says nothing
        check_integer(found)
    return ints


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
