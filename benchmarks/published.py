"""The published training step's parts, written from their description: what the benchmarks compare with.

Zhuang, Wang, Qiao, AAAI 2020, and its code for torch 0.4: pairs are found on the host in numpy; the head concatenates
the features of each pair, classifies four features one by one, and copies their logits together for the loss.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mine(features: Tensor, labels: Tensor) -> Tensor:
    """Partners [2B] of the same class and of another: distances on the device, the rest in numpy on the host."""
    squares = features.square().sum(1)
    distance = (squares[:, None] - 2 * features @ features.T + squares).cpu().numpy()
    classes = labels.cpu().numpy()[:, None]
    same = classes == classes.T
    np.fill_diagonal(same, False)
    intra = np.where(same, distance, np.inf).argmin(1)
    np.fill_diagonal(same, True)
    inter = np.where(same, np.inf, distance).argmin(1)
    pairs = np.zeros((2 * len(classes), 2))
    for half, partners in enumerate((intra, inter)):
        for row, partner in enumerate(partners):
            pairs[half * len(classes) + row] = row, partner
    return torch.from_numpy(pairs).long().to(features.device)[:, 1]


class Head(nn.Module):
    """Mutual vector, gates, four classifications."""

    def __init__(self, dim: int, num_classes: int, hidden_dim: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        self.map1, self.map2 = nn.Linear(2 * dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.fc = nn.Linear(dim, num_classes)
        self.drop = nn.Dropout(dropout)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits of the first image under its own and the second's gate, and of the second likewise."""
        mutual = self.map2(self.drop(self.map1(torch.cat([first, second], 1))))
        gate1, gate2 = torch.sigmoid(mutual * first), torch.sigmoid(mutual * second)
        features = (gate1 * first + first, gate2 * first + first, gate2 * second + second, gate1 * second + second)
        return tuple(self.fc(self.drop(feature)) for feature in features)


def loss(logits: tuple[Tensor, Tensor, Tensor, Tensor], first: Tensor, second: Tensor, margin: float = 0.05) -> Tensor:
    """Cross-entropy and ranking of the logits of pairs, given the labels of their images."""
    size, classes = logits[0].shape
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    own = torch.zeros(2 * size, classes, device=first.device, dtype=dtype)
    other = torch.zeros_like(own)
    own[:size], other[:size], own[size:], other[size:] = logits
    labels = torch.cat([first, second])
    cross_entropy = F.cross_entropy(torch.cat([own, other]), torch.cat([labels, labels]))
    rows = torch.arange(2 * size, device=first.device)
    own_score, other_score = (F.softmax(value, dim=-1)[rows, labels] for value in (own, other))
    ranking = F.margin_ranking_loss(own_score, other_score, torch.ones_like(own_score), margin=margin)
    return cross_entropy + ranking


def training_loss(head: Head, features: Tensor, labels: Tensor, partner: Tensor | None = None) -> Tensor:
    """The loss of a batch: of pairs with these partners [2B], or with those that are mined."""
    if partner is None:
        partner = mine(features.detach().float(), labels)  # numpy has no half precision of this kind
    anchor = torch.arange(len(labels), device=labels.device).repeat(2)
    return loss(head(features[anchor], features[partner]), labels[anchor], labels[partner])
