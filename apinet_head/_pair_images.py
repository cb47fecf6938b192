"""The images of pairs, as rows of tables: where partners are searched, and what is kept for the backward pass."""

from typing import NamedTuple

import torch
from torch import Tensor

from apinet_head.pairs import Pairs


class Keys(NamedTuple):
    """Where partners are searched, if not in the batch alone: K rows of features, then those of a memory."""

    features: Tensor  # [K,D]
    labels: Tensor  # [K+N]
    offset: int | None  # the row of query 0
    past: Tensor | None = None  # [N,D]

    def all(self) -> tuple[Tensor, Tensor, int | None]:
        """Keys, their labels and the offset, for `find_pairs`; with a memory a copy of all."""
        keys = self.features if self.past is None else torch.cat([self.features.detach(), self.past])
        return keys, self.labels, self.offset

    def take(self, rows: Tensor) -> Tensor:
        """Rows of all keys, where the past, which may be much larger than the batch, takes no room for a gradient."""
        if self.past is None:
            return self.features.index_select(0, rows)
        size = self.features.shape[0]
        recent = self.features.index_select(0, rows.clamp(max=size - 1))
        past = self.past.index_select(0, (rows - size).clamp(min=0))
        return recent.where((rows < size)[:, None], past.to(recent.dtype))


class Images(NamedTuple):
    """The images of P pairs, as rows of a table: those take less memory to keep than the images."""

    table: Tensor  # [N,D]
    rows: Tensor  # [2,P], of the anchors and of the partners
    shared: bool = False  # whether most rows of the table are in several pairs

    def take(self) -> Tensor:
        """[2,P,D]; index_select has the quicker backward pass."""
        return self.table.index_select(0, self.rows.flatten()).view(*self.rows.shape, self.table.shape[1])


def images_of(features: Tensor, pairs: Pairs, partner: Tensor | None) -> Images:
    """The images of pairs of rows of features [B,D], or of such rows and partners [P,D] from elsewhere."""
    if partner is None:
        return Images(features, torch.stack([pairs.anchor, pairs.partner]), shared=True)
    # A pair that doesn't exist points at any row of keys; were that one not finite, it would spoil the gradients
    # although the loss leaves the pair out.
    partner = partner.where(pairs.valid[:, None], features.index_select(0, pairs.anchor))
    rows = torch.arange(partner.shape[0], device=features.device) + features.shape[0]
    return Images(torch.cat([features, partner]), torch.stack([pairs.anchor, rows]))
