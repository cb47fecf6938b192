"""Pairs to and from pytorch-metric-learning: its miners for our head, ours for its losses.

Needs `pip install pytorch-metric-learning`; nothing else in the package imports this.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apinet_head._checks import check_device, check_integer
from apinet_head.pairs import Pairs, mine_pairs, searches_of

if TYPE_CHECKING:  # that library has no types; its miners are modules
    from torch.nn import Module as BaseMiner
else:
    try:
        from pytorch_metric_learning.miners import BaseMiner
    except ImportError as error:
        raise ImportError(
            "apinet_head.metric_learning needs pytorch-metric-learning: pip install pytorch-metric-learning"
        ) from error

PAIRS, TRIPLETS = ("anchor", "positive", "anchor", "negative"), ("anchor", "positive", "negative")


def pairs_from_tuple(indices: Sequence[Tensor]) -> Pairs:
    """What a miner of pytorch-metric-learning found, as `pairs=` for `APIHead`.

    All pairs are kept as they come: several of one anchor or none, and those of a triplet's anchor and positive as
    often as there are triplets with them, as in that library's losses. An empty tuple gives a loss of 0.

    Args:
        indices: (anchors, positives, anchors, negatives) or (anchors, positives, negatives), each [N] of its own length
            but for the partners of its anchors, rows of the batch. If the miner was given `ref_emb`, the partners are
            rows of that: pass it to the head as `keys`.

    Returns:
        Pairs with first all positive and then all negative pairs, all of them valid.

    Raises:
        ValueError: there are not three or four vectors of integers, or an anchor's partner is missing.

    Examples:
        >>> from pytorch_metric_learning.miners import MultiSimilarityMiner
        >>> from apinet_head import APIHead, api_loss
        >>> features, labels = torch.randn(8, 16), torch.arange(8) // 2
        >>> mined = MultiSimilarityMiner()(features, labels)
        >>> loss = api_loss(APIHead(dim=16, num_classes=4)(features, labels, pairs=pairs_from_tuple(mined)))
    """
    names = {len(names): names for names in (PAIRS, TRIPLETS)}.get(len(indices))
    if names is None:
        raise ValueError(f"a miner finds ({', '.join(PAIRS)}) or ({', '.join(TRIPLETS)}), got {len(indices)} items")
    for name, rows in zip(names, indices, strict=True):
        check_integer(rows, f"the miner's {name}")
        check_device(rows, f"the miner's {name}", indices[0], "its first anchor")
    positive, negative = indices[:2], indices[2:] if names is PAIRS else indices[::2]
    for kind, (anchor, partner) in (("positive", positive), ("negative", negative)):
        if anchor.shape != partner.shape:
            raise ValueError(f"each {kind} needs its anchor, got {len(anchor)} anchors and {len(partner)} {kind}s")
    anchor, partner = (torch.cat([rows, others]).long() for rows, others in zip(positive, negative, strict=True))
    place = torch.arange(len(anchor), device=anchor.device)
    return Pairs(anchor, partner, same_class=place < len(positive[0]), valid=torch.ones_like(place, dtype=torch.bool))


class APIMiner(BaseMiner):
    """`mine_pairs` as a miner of pytorch-metric-learning, for any of its losses.

    It takes Euclidean distances of the embeddings as they are, while that library's distances and losses normalise
    them to length 1 unless told otherwise: pass `F.normalize(embeddings)` to find the partners that those would.
    Leaving out the pairs that don't exist makes the host wait for the device, as with all miners of that library.

    With `ref_emb`, partners are searched there. Those must not hold the embeddings themselves, as the memory of
    `CrossBatchMemory` does: each would be its own nearest.

    Args:
        intra: partner of the same class: "similar", "dissimilar", "random" or None, see `mine_pairs`.
        inter: partner of another class, likewise.

    Raises:
        ValueError: intra or inter is unknown, or both are None.

    Examples:
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> embeddings, labels = torch.randn(8, 16), torch.arange(8) // 2
        >>> anchors, positives, others, negatives = APIMiner()(embeddings, labels)
        >>> loss = ContrastiveLoss()(embeddings, labels, (anchors, positives, others, negatives))
    """

    def __init__(self, intra: str | None = "similar", inter: str | None = "similar") -> None:
        super().__init__()
        searches_of(intra, inter)
        self.intra: str | None = intra
        self.inter: str | None = inter

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors of anchors, positives, anchors and negatives."""
        elsewhere = ref_emb is not embeddings
        pairs = mine_pairs(
            embeddings, labels, intra=self.intra, inter=self.inter,
            keys=ref_emb if elsewhere else None, key_labels=ref_labels if elsewhere else None,
        )  # fmt: skip
        positive, negative = pairs.valid & pairs.same_class, pairs.valid & ~pairs.same_class
        return pairs.anchor[positive], pairs.partner[positive], pairs.anchor[negative], pairs.partner[negative]

    def extra_repr(self) -> str:
        return f"intra={self.intra!r}, inter={self.inter!r}"
