"""Balanced batches of n_classes classes x n_samples images, so that every image has a partner of its own class."""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from apinet_head._checks import check_int, check_integer, shown

SETTINGS = ("seed", "n_classes", "n_samples", "n_batches", "n_images", "n_labels")  # what the batches depend on


class BalancedBatchSampler(Sampler[list[int]]):
    """Index lists for `DataLoader(batch_sampler=...)`: n_classes distinct classes x n_samples images per batch.

    The classes of a batch are contiguous. Within a class, images are drawn without replacement until all were used,
    then reshuffled; a class with fewer than n_samples images repeats them. Classes are drawn in the same way, so that
    in an epoch all occur equally often, to within one. (The paper, section 4, draws the classes of each batch
    independently.)

    Batches depend on `seed` and the epoch alone: call `set_epoch` before each. Under torch.distributed, each rank takes
    its own `n_classes / world_size` classes of each global batch.

    Args:
        labels: class of each image: a sequence of ints, a tensor, an array or a pandas Series. Images with a negative
            label have no class and are left out.
        n_classes: classes in a global batch.
        n_samples: images of each class.
        n_batches: batches in an epoch; None for the number of images // the global batch size, at least 1.
        seed: of the order.
        rank: of this process; None for that of torch.distributed, or 0.
        world_size: number of processes; None for that of torch.distributed, or 1.

    Raises:
        ValueError: labels are not integers, there are fewer classes than n_classes, n_classes is not divisible by
            world_size, or a number is out of range.
        TypeError: an argument has the wrong type.

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
        values, order = _as_tensor(labels).sort(stable=True)
        negative = int((values < 0).sum())
        # The images of the c-th class in ascending order are _images[_starts[c]:][:_sizes[c]].
        self._images = order[negative:]
        self._sizes = torch.unique_consecutive(values[negative:], return_counts=True)[1]
        self._starts = self._sizes.cumsum(0) - self._sizes
        self.n_images: int = len(self._images)
        self.n_labels: int = len(self._sizes)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            world_size = torch.distributed.get_world_size() if world_size is None else world_size
        self.n_classes: int = check_int(n_classes, "n_classes", 1)
        self.n_samples: int = check_int(n_samples, "n_samples", 1)
        self.seed: int = check_int(seed, "seed")
        self.rank: int = 0 if rank is None else check_int(rank, "rank")
        self.world_size: int = 1 if world_size is None else check_int(world_size, "world_size", 1)
        if n_batches is None:
            n_batches = max(1, self.n_images // (self.n_classes * self.n_samples))
        self.n_batches: int = check_int(n_batches, "n_batches", 1)
        if self.n_classes > self.n_labels:
            without = f" beside {negative} negative ones" if negative else ""
            raise ValueError(f"cannot draw n_classes={n_classes} classes: labels have {self.n_labels}{without}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be at least 0 and less than world_size={self.world_size}")
        if self.n_classes % self.world_size:
            raise ValueError(f"n_classes={n_classes} must be divisible by world_size={self.world_size}")
        largest = int(self._sizes.max())
        if self.n_samples == 1 or largest == 1:
            reason = "no class has a second image" if largest == 1 else "n_samples=1, take 2 or more"
            warnings.warn(
                f"no image will have another of the same class in its batch: {reason}. A head can do without such "
                "partners, with intra=None",
                stacklevel=2,
            )
        self.epoch: int = 0
        self._start = 0  # batches of this epoch that a resumed run skips
        self._drawn = 0

    def __len__(self) -> int:
        """Number of batches that iteration yields; after `load_state_dict`, the rest of the epoch."""
        return self.n_batches - self._start

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start, self._drawn = self._start, 0, 0
        share, key = self.n_classes // self.world_size, f"{self.seed} {self.epoch}"
        class_deck = _Deck(self.n_labels, self.n_classes, key)

        @lru_cache(maxsize=1 << 16)  # bounds memory; a deck is recreated within microseconds
        def image_deck(label: int, size: int) -> _Deck:
            return _Deck(size, self.n_samples, f"{key} {label}")

        for batch in range(start, self.n_batches):
            self._drawn = batch + 1
            first = self.rank * share
            mine = class_deck.hand(batch)[first : first + share]
            rows = []
            for place, (label, start_row, size) in enumerate(
                zip(mine, self._starts[mine].tolist(), self._sizes[mine].tolist(), strict=True), first
            ):
                # Every class is drawn once per round.
                times = (batch * self.n_classes + place) // self.n_labels
                rows += [start_row + item for item in image_deck(label, size).hand(times)]
            yield _Batch(self._images[rows].tolist())

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch to iterate over, from its first batch unless just resumed within it."""
        epoch = check_int(epoch, "epoch", 0)
        if epoch != self.epoch:
            self.epoch, self._start, self._drawn = epoch, 0, 0

    @property
    def sampler(self) -> "BalancedBatchSampler":
        """Itself: Lightning and some versions of accelerate call `set_epoch` only on `batch_sampler.sampler`."""
        return self

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """The position in the epoch, as ints.

        Args:
            batches_done: number of batches trained on. None for the number drawn, which under a DataLoader with
                workers is too large, because they prefetch.
        """
        done = check_int(self._drawn if batches_done is None else batches_done, "batches_done", 0, self.n_batches)
        return {"epoch": self.epoch, "batches_done": done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict()`: the next iteration yields the rest of that epoch.

        Raises:
            ValueError: entries are missing, or the sampler had other settings.
            TypeError: the state is not a dict, or an entry is not an int.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of a sampler is a dict, got {type(state).__name__}")
        if missing := [name for name in ("epoch", "batches_done", *SETTINGS) if name not in state]:
            raise ValueError(f"the state of the sampler lacks {', '.join(missing)}, got {shown(dict(state))}")
        here = self._settings()
        there = {name: check_int(state[name], name) for name in SETTINGS}
        if there != here:
            other = [f"{name}: {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
            raise ValueError(f"this state is of a sampler with other settings: {'; '.join(other)}")
        epoch = check_int(state["epoch"], "epoch", 0)
        done = check_int(state["batches_done"], "batches_done", 0, self.n_batches)
        self.epoch, self._start, self._drawn = epoch, done, done

    def _settings(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SETTINGS}


class _Batch(list[int]):
    """Rows of a batch. As an index into a data set's list, which `DataLoader(sampler=...)` makes of it, it raises."""

    def __index__(self) -> int:
        raise TypeError("BalancedBatchSampler yields batches: give it to DataLoader as batch_sampler=, not sampler=")


def _as_tensor(labels: Sequence[int] | Tensor) -> Tensor:
    """The labels as int64 on the CPU."""
    # A data set is rejected without reading items, which may decode images.
    if isinstance(labels, Dataset) or not (isinstance(labels, (Tensor, Sequence)) or hasattr(labels, "__array__")):
        raise TypeError(
            f"labels must be a sequence of ints, or a tensor or array of them, got {type(labels).__name__}: pass the "
            "labels of a data set, such as dataset.targets or [label for _, label in dataset]"
        )
    try:
        # Via Python ints, as arrays may hold objects or unsigned ints, and a pandas Series has its own index.
        integers = torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels).tolist(), device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be ints, or a tensor or array of them, got {shown(labels)}") from error
    if integers.numel():  # an empty list has a floating point dtype
        check_integer(integers)
    return integers.long()


class _Deck:
    """The items 0 to size - 1 in random order, dealt in hands of one size and reshuffled after each round.

    No hand has an item twice unless it is larger than the deck. A hand depends on its number and the key alone.
    """

    def __init__(self, size: int, hand: int, key: str) -> None:
        self.size, self.hand_size, self.key = size, hand, key
        self.round, self.order = -1, torch.empty(0)

    def hand(self, number: int) -> list[int]:
        first, dealt = number * self.hand_size, list[int]()
        while len(dealt) < self.hand_size:
            which, place = divmod(first + len(dealt), self.size)
            dealt += self._round(which)[place : place + self.hand_size - len(dealt)].tolist()
        return dealt

    def _round(self, which: int) -> Tensor:
        if which not in (self.round, self.round + 1):
            # Restart at the last round that begins with a new hand, as it does not depend on the previous rounds.
            self.round = which - which % (self.hand_size // math.gcd(self.size, self.hand_size)) - 1
        while self.round < which:
            self.round += 1
            order = _permutation(self.size, f"{self.key} {self.round}")
            if begun := self.round * self.size % self.hand_size:
                # The first items complete the hand begun in the last round, so items that it holds are moved back.
                held = set(self.order[-begun:].tolist())
                first = sorted(order[: self.hand_size].tolist(), key=held.__contains__)
                order[: self.hand_size] = torch.tensor(first, device="cpu")
            self.order = order
        return self.order


def _permutation(size: int, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    # On the CPU, so that the order does not depend on the default device.
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
