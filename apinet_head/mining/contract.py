"""What every mining backend takes and gives."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Search(NamedTuple):
    """One partner to find for every query: "similar", "dissimilar" or "random", of its class or of another."""

    how: str
    same_class: bool


class Found(NamedTuple):
    """The partners of all queries in S searches: their rows in keys [S,B] int64, arbitrary where not `valid` [S,B]."""

    partner: Tensor
    valid: Tensor


class Backend(Protocol):
    """The search behind `mine_pairs`, on arguments it has checked: B >= 1, M >= 1, all on one device, none "random"."""

    def __call__(
        self,
        features: Tensor,
        labels: Tensor,
        keys: Tensor | None,
        key_labels: Tensor,
        key_offset: int | None,
        searches: Sequence[Search],
    ) -> Found:
        """The results in order of the searches; keys None: features are searched themselves, with key_offset 0."""
        ...
