"""Adapters for pytorch-metric-learning: its miners for `APIHead`, `mine_pairs` for its losses."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apinet_head._checks import check_device, check_integer, describe
from apinet_head.pairs import Pairs, mine_pairs, searches_of

if TYPE_CHECKING:  # the library has no types; its miners are modules
    from torch.nn import Module as BaseMiner
else:
    try:
        from pytorch_metric_learning.miners import BaseMiner
    except ImportError as error:
        raise ImportError(
            "apinet_head.metric_learning needs pytorch-metric-learning: pip install pytorch-metric-learning"
        ) from error


def pairs_from_tuple(indices: Sequence[Tensor]) -> Pairs:
    """Convert the output of a miner of pytorch-metric-learning to `pairs=` for `APIHead`.

    All pairs are kept: an anchor may have several or none, and a triplet's anchor and positive are repeated in each of
    their triplets. Empty tensors give a loss of 0.

    Args:
        indices: (anchors, positives, anchors, negatives) or (anchors, positives, negatives), rows of the batch. If the
            miner was given `ref_emb`, partners are rows of that: pass it to the head as `keys`.

    Returns:
        Pairs, the positive ones before the negative ones, all valid.

    Raises:
        ValueError: there are not three or four integer vectors, or an anchor has no partner.

    Examples:
        >>> from pytorch_metric_learning.miners import MultiSimilarityMiner
        >>> from apinet_head import APIHead, api_loss
        >>> features, labels = torch.randn(8, 16), torch.arange(8) // 2
        >>> mined = MultiSimilarityMiner()(features, labels)
        >>> loss = api_loss(APIHead(dim=16, num_classes=4)(features, labels, pairs=pairs_from_tuple(mined)))
    """
    if len(indices) not in (3, 4):
        raise ValueError(
            "indices must be (anchor, positive, anchor, negative) or (anchor, positive, negative), "
            f"got {len(indices)} items"
        )
    a1, positive, *rest = indices
    a2, negative = rest if len(rest) == 2 else (a1, *rest)
    for name, rows in (("anchor", a1), ("positive", positive), ("anchor", a2), ("negative", negative)):
        check_integer(rows, f"the miner's {name}")
        check_device(rows, f"the miner's {name}", a1, "its first anchor")
    for kind, anchor, partner in (("positive", a1, positive), ("negative", a2, negative)):
        if anchor.shape != partner.shape:
            raise ValueError(f"each {kind} needs its anchor, got {len(anchor)} anchors and {len(partner)} {kind}s")
    anchor, partner = torch.cat([a1, a2]).long(), torch.cat([positive, negative]).long()
    same_class = torch.arange(len(anchor), device=anchor.device) < len(a1)
    return Pairs(anchor, partner, same_class, valid=torch.ones_like(same_class))


class APIMiner(BaseMiner):
    """`mine_pairs` as a miner of pytorch-metric-learning, for any of its losses.

    Distances are Euclidean between the embeddings as they are, while that library normalises them to unit length by
    default: pass `F.normalize(embeddings)` to find the same partners. As in all its miners, dropping invalid pairs
    synchronises with the device.

    With `ref_emb`, partners are searched there. If it holds the whole batch in order, as the memory of
    `CrossBatchMemory` and the rows of all ranks in `DistributedMinerWrapper(efficient=True)` do, no embedding is paired
    with its own copy.

    Args:
        intra: as `inter`, see `mine_pairs`.

    Raises:
        ValueError: intra or inter is unknown, or both are None; or in mining, `ref_emb` holds the embeddings in another
            order, so that each would be its own partner.

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
        """Anchors, positives, anchors and negatives."""
        mine = partial(mine_pairs, embeddings, labels, intra=self.intra, inter=self.inter)
        place = 0 if ref_emb is embeddings else _place_in(ref_emb, ref_labels, embeddings, labels)
        if ref_emb is embeddings:
            pairs = mine()
        elif place is None:
            pairs = mine(keys=ref_emb, key_labels=ref_labels)
        else:
            # A batch may wrap around the end of a ring buffer: rotate the buffer until the batch comes first.
            pairs = mine(keys=ref_emb.roll(-place, 0), key_labels=ref_labels.roll(-place), key_offset=0)
            pairs = pairs._replace(partner=(pairs.partner + place) % len(ref_emb))
        positive, negative = pairs.valid & pairs.same_class, pairs.valid & ~pairs.same_class
        if place is None and positive.any():
            copies = ref_emb[pairs.partner[positive]] == embeddings[pairs.anchor[positive]]
            if copies.all():
                raise ValueError(
                    f"ref_emb {describe(ref_emb)} holds the embeddings {describe(embeddings)} themselves, but not in "
                    "their order: each would be its own partner. Remove them from ref_emb, or put them first"
                )
        return pairs.anchor[positive], pairs.partner[positive], pairs.anchor[negative], pairs.partner[negative]

    def extra_repr(self) -> str:
        return f"intra={self.intra!r}, inter={self.inter!r}"


def _place_in(ref_emb: Tensor, ref_labels: Tensor, embeddings: Tensor, labels: Tensor) -> int | None:
    """The row where the batch begins in ref_emb, which may wrap around its end; None if ref_emb lacks it.

    The library passes this position to its losses and wrappers, but not to its miners.
    """
    if embeddings.dtype != ref_emb.dtype or not 0 < len(embeddings) <= len(ref_emb):
        return None
    # Compared as bytes, so that a row with NaN equals its copy.
    rows, refs = (table.detach().contiguous().view(torch.uint8) for table in (embeddings, ref_emb))
    starts = (refs == rows[0]).all(1).nonzero()
    places = (starts + torch.arange(len(rows), device=rows.device)) % len(refs)
    places = places[(ref_labels[places] == labels).all(1)]
    for place in places.flip(0):  # newest first, if the memory holds the same batch twice
        if torch.equal(refs[place], rows):
            return int(place[0])
    return None
