"""What every mining backend takes and gives."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Search(NamedTuple):
    """One partner to find for every query: "similar", "dissimilar" or "random", of its class or of another."""

    how: str
    same_class: bool


class Query(NamedTuple):
    """What is searched, and among what: arguments of `mine_pairs`, checked, with B >= 1 and M >= 1.

    Attributes:
        features: [B,D], detached.
        labels: [B]; a negative label means "no class".
        keys: [M,D], detached; None if the features are searched among themselves.
        key_labels: [M], those of the features if keys is None.
        key_offset: the row of the keys that is query 0, 0 if keys is None; None if the queries are not among the keys.
        searches: S of them, at most one of the same class and then at most one of another.
    """

    features: Tensor
    labels: Tensor
    keys: Tensor | None
    key_labels: Tensor
    key_offset: int | None
    searches: tuple[Search, ...]

    @property
    def rows(self) -> Tensor:
        """The rows that partners are found among, [M,D]."""
        return self.features if self.keys is None else self.keys

    @property
    def shape(self) -> tuple[int, int]:
        """B and M."""
        return self.features.shape[0], self.rows.shape[0]


class Found(NamedTuple):
    """The partners of all queries in S searches: their rows in keys [S,B] int64, arbitrary where not `valid` [S,B]."""

    partner: Tensor
    valid: Tensor


Backend = Callable[[Query], Found]


def flip(searches: Sequence[Search], values: Tensor) -> Tensor:
    """Squared distances [S,...] as costs, and back: negative in searches for the farthest."""
    if "dissimilar" not in [search.how for search in searches]:
        return values
    return torch.stack([v if s.how == "similar" else -v for s, v in zip(searches, values.unbind(0), strict=True)])


def is_eager_cpu(rows: Tensor) -> bool:
    """Whether values of these can be read without waiting for a device: CPU tensors, not traced and not fake."""
    return rows.device.type == "cpu" and type(rows) in (Tensor, torch.nn.Parameter) and not _is_traced()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_exporting() -> bool:
    """Whether torch.export traces this, as far as this version of PyTorch can tell."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def peaks(rows: Tensor) -> Tensor:
    """The largest absolute value of each row [N]; NaN and infinity come through."""
    return torch.maximum(rows.amax(1), -rows.amin(1))  # on a CPU an infinity norm takes 15 times as long


def finite_rows(rows: Tensor) -> Tensor:
    """Which rows hold finite numbers only, [N] bool."""
    return peaks(rows).isfinite()
