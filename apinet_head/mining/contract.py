"""What every mining backend takes and gives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Search(NamedTuple):
    """One partner to find for every query: "similar", "dissimilar" or "random", of its class or of another."""

    how: str
    same_class: bool


class Found(NamedTuple):
    """The partners of all queries: their rows in keys [B] int64, arbitrary where `valid` [B] is False."""

    partner: Tensor
    valid: Tensor


class Backend(Protocol):
    """The search behind `mine_pairs`, on arguments it has checked: B >= 1, M >= 1, all on one device."""

    def __call__(
        self,
        features: Tensor,
        labels: Tensor,
        keys: Tensor | None,
        key_labels: Tensor,
        key_offset: int | None,
        searches: Sequence[Search],
        generator: torch.Generator | None,
    ) -> list[Found]:
        """One result per search; keys None means that features are searched themselves, with key_offset 0."""
        ...
