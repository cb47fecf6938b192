"""Balanced batches: n_classes classes with n_samples images each, so that every image has a same-class partner."""

import hashlib
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler

from apinet_head._checks import check_int, check_integer, shown


class BalancedBatchSampler(Sampler[list[int]]):
    """Index lists for `DataLoader(batch_sampler=...)`: n_classes distinct classes x n_samples images.

    The classes of a batch are contiguous in it. Within a class, images are drawn in random order without replacement
    until all were used, then reshuffled; a class with fewer than n_samples images repeats them. Classes are drawn in
    the same way, so that over an epoch all classes come up equally often, to within one. (The paper, section 4, draws
    the classes of each batch at random.)

    The batches of an epoch depend on `seed` and the epoch alone: call `set_epoch` before each. Under torch.distributed,
    each rank takes its own `n_classes / world_size` classes of each global batch. The images of a class are shuffled
    when it is drawn, so that epochs and resumed runs start at once, however many classes there are.

    Args:
        labels: the class of each image of the data set (not the data set itself): a sequence of ints, a tensor, an
            array or a pandas Series. A negative label means "no class": such an image is left out.
        n_classes: number of classes in a global batch.
        n_samples: number of images of each class; with 1, no image has a same-class partner.
        n_batches: number of batches in an epoch; None for the number of images // the global batch size, at least 1.
        seed: seed of the order.
        rank: rank of this process; None asks torch.distributed, and is 0 without it.
        world_size: number of processes; None likewise.

    Raises:
        ValueError: labels are not of an integer dtype or all negative, fewer classes than n_classes, n_classes not
            divisible by world_size, or a number out of range.
        TypeError: labels are no sequence, tensor or array, or a number is no int. On iteration: the sampler was passed
            to a DataLoader as `sampler=`.

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
        # The images of class c, counted in ascending order of the labels, are _images[_starts[c]:][:_sizes[c]].
        self._images = order[negative:]
        self._sizes = torch.unique_consecutive(values[negative:], return_counts=True)[1]
        self._starts = self._sizes.cumsum(0) - self._sizes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            world_size = torch.distributed.get_world_size() if world_size is None else world_size
        self.n_classes: int = check_int(n_classes, "n_classes", 1)
        self.n_samples: int = check_int(n_samples, "n_samples", 1)
        self.seed: int = check_int(seed, "seed")
        self.rank: int = 0 if rank is None else check_int(rank, "rank")
        self.world_size: int = 1 if world_size is None else check_int(world_size, "world_size", 1)
        if n_batches is None:
            n_batches = max(1, len(self._images) // (self.n_classes * self.n_samples))
        self.n_batches: int = check_int(n_batches, "n_batches", 1)
        if negative and not len(self._images):
            raise ValueError(f"all {negative} labels are negative, which means that the images have no class")
        if self.n_classes > len(self._sizes):
            raise ValueError(f"cannot draw n_classes={n_classes} classes for a batch: labels have {len(self._sizes)}")
        if self.n_classes % self.world_size or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"n_classes={n_classes} must be divisible by world_size={world_size}, "
                f"and rank={rank} in [0, {world_size})"
            )
        if self.n_samples == 1 or self._sizes.max() == 1:
            warnings.warn(
                f"no image will have another of the same class in its batch: n_samples={n_samples}, and the largest "
                f"class has {int(self._sizes.max())} images; take n_samples >= 2, unless the head has intra=None",
                stacklevel=2,
            )
        self.epoch: int = 0
        self._start = 0  # batches of this epoch to skip, because a resumed run has already trained on them
        self._drawn = 0

    def __len__(self) -> int:
        """The number of batches that iteration yields; after `load_state_dict`, those left of the epoch."""
        return self.n_batches - self._start

    def __iter__(self) -> Iterator[list[int]]:
        # A DataLoader wraps what it is given as `sampler=` in a BatchSampler: that would make batches of batches.
        caller = sys._getframe(1).f_locals.get("self")
        if type(caller) is BatchSampler and getattr(caller, "sampler", None) is self:
            raise TypeError(
                "BalancedBatchSampler yields whole batches: pass it as DataLoader(batch_sampler=...), not as sampler=, "
                "and without batch_size, shuffle and drop_last"
            )
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        start, self._start, self._drawn = self._start, 0, 0
        share, classes = self.n_classes // self.world_size, len(self._sizes)
        key = f"{self.seed} {self.epoch}"
        class_deck = _Deck(classes, self.n_classes, key)

        @lru_cache(maxsize=1 << 16)  # limits the memory; making a deck again takes microseconds
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
                # A round has every class once, so that its number is how often this class was drawn before.
                times = (batch * self.n_classes + place) // classes
                rows += [start_row + item for item in image_deck(label, size).hand(times)]
            yield self._images[rows].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Iterate over the batches of this epoch from now on, from its first one unless just resumed within it."""
        epoch = check_int(epoch, "epoch", 0)
        if epoch != self.epoch:
            self.epoch, self._start, self._drawn = epoch, 0, 0

    @property
    def sampler(self) -> "BalancedBatchSampler":
        """Itself: Lightning, and some versions of accelerate, call `set_epoch` only on a batch sampler's `sampler`."""
        return self

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """The position in the epoch, as plain ints, to resume from.

        Args:
            batches_done: number of batches of the epoch that were trained on. None for the number drawn, which is too
                large under a DataLoader with workers, because they prefetch.

        Raises:
            ValueError: the epoch has fewer batches than that.
        """
        done = self._drawn if batches_done is None else self._check_done(batches_done)
        return {"epoch": self.epoch, "batches_done": done, **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where `state_dict` was taken: the next iteration yields the rest of that epoch.

        Raises:
            ValueError: entries are missing, or the state is of a sampler with other settings, whose batches differ.
            TypeError: the state is no dict, or an entry no int.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of a sampler is a dict, got {type(state).__name__}")
        names = ("epoch", "batches_done", *self._settings())
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"no state of a sampler: without {', '.join(missing)}, got {shown(dict(state))}")
        numbers = {name: check_int(state[name], name, 0 if name == "epoch" else None) for name in names}
        differences = [
            f"{name}: {numbers[name]} there, {value} here"
            for name, value in self._settings().items()
            if numbers[name] != value
        ]
        if differences:
            raise ValueError(f"this state is of a sampler with other settings: {'; '.join(differences)}")
        self._start = self._drawn = self._check_done(numbers["batches_done"])
        self.epoch = numbers["epoch"]

    def _check_done(self, batches_done: int) -> int:
        done = check_int(batches_done, "batches_done")
        if not 0 <= done <= self.n_batches:
            raise ValueError(f"batches_done must be in [0, {self.n_batches}], got {done}")
        return done

    def _settings(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "n_classes": self.n_classes,
            "n_samples": self.n_samples,
            "n_batches": self.n_batches,
            "n_images": len(self._images),
            "n_labels": len(self._sizes),
        }


def _as_tensor(labels: Sequence[int] | Tensor) -> Tensor:
    """The labels as int64 on the CPU."""
    to_array = None if isinstance(labels, Tensor) else getattr(labels, "__array__", None)
    # Of a data set nothing is read: one item might be an image to decode.
    if isinstance(labels, Dataset) or not (to_array or isinstance(labels, (Tensor, Sequence))):
        raise TypeError(
            f"labels must be a sequence of ints, or a tensor or array of them, got {type(labels).__name__}: of a data "
            "set, pass the labels, such as dataset.targets or [label for _, label in dataset]"
        )
    try:
        found: Any = labels
        if to_array:  # a pandas Series has one too; as a sequence, its own index would count
            array = to_array()
            # As Python ints, objects are read, and unsigned ints too large for int64 are an error.
            found = array.tolist() if array.dtype.kind in "Ou" else array.copy()
        integers = torch.as_tensor(found, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises any of them
        raise ValueError(f"labels must be ints, or a tensor or array of them, got {shown(labels)}") from error
    if integers.numel():  # of no labels at all, the dtype says nothing
        check_integer(integers)
    return integers.long()


class _Deck:
    """The items 0 to size - 1 in random order, dealt in hands of equal size, and reshuffled once all are dealt.

    No hand has an item twice, unless it is larger than the deck. A hand depends on its number and the key alone, so
    that any can be dealt without those before it.
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
            # Go back to the last round that begins with a new hand, which does not depend on the rounds before.
            self.round = which - which % (self.hand_size // math.gcd(self.size, self.hand_size)) - 1
        while self.round < which:
            self.round += 1
            order = _permutation(self.size, f"{self.key} {self.round}")
            if begun := self.round * self.size % self.hand_size:
                # The hand that began in the last round comes first, and must not get again what it holds.
                held = set(self.order[-begun:].tolist())
                first = sorted(order[: self.hand_size].tolist(), key=held.__contains__)
                order[: self.hand_size] = torch.tensor(first, device="cpu")
            self.order = order
        return self.order


def _permutation(size: int, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
    # On the CPU, whatever the default device: the order must not depend on it.
    return torch.randperm(size, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
