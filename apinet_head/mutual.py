"""Mutual vectors: what the two images of a pair have to say to each other (paper, section 3.1, equation 1)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class MutualMLP(nn.Module):
    """m = fc2(drop(fc1([x_a, x_b]))), without an activation in between, as published.

    Example:
        >>> import torch
        >>> MutualMLP(dim=8, hidden_dim=4)(torch.zeros(3, 8), torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(self, dim: int, hidden_dim: int = 512, dropout: float = 0.5, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * dim, hidden_dim, **factory)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)

    def forward(self, anchor: Tensor, partner: Tensor) -> Tensor:
        """Mutual vectors [P,D] of the pairs (anchor[p], partner[p]), both [P,D]."""
        left, right = self.fc1.weight.chunk(2, dim=1)
        return self._finish(F.linear(anchor, left, self.fc1.bias) + F.linear(partner, right))

    def of_rows(self, features: Tensor, anchor: Tensor, partner: Tensor) -> Tensor:
        """The same for the pairs (features[anchor[p]], features[partner[p]]) of the rows of features [B,D].

        fc1 is linear: [x_a, x_b] W = x_a W_left + x_b W_right. Each image is in several pairs, so projecting it once
        and gathering the short results costs less than gathering the pairs and projecting those.
        """
        left, right = self.fc1.weight.chunk(2, dim=1)
        hidden = F.linear(features, left, self.fc1.bias).index_select(0, anchor)
        return self._finish(hidden + F.linear(features, right).index_select(0, partner))

    def _finish(self, hidden: Tensor) -> Tensor:
        mutual: Tensor = self.fc2(self.drop(hidden))
        return mutual
