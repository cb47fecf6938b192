"""Which images to compare: the pairs that API-Net trains on (paper, section "Class-Balanced Pair Construction")."""

from typing import NamedTuple

import torch
from torch import Tensor

from apinet_head._checks import (
    check_device,
    check_features,
    check_generator,
    check_int,
    check_integer,
    check_labels,
    describe,
)
from apinet_head.mining import BACKENDS, Query, Search, find
from apinet_head.mining.query import is_eager_cpu

SEARCHES = ("similar", "dissimilar", "random")


class Pairs(NamedTuple):
    """P pairs of images, as tensors [P] on the features' device.

    A pair without a possible partner has `valid` False and its anchor as its partner, so that gathers stay in range
    and no wrong-class pair is ever trained on.

    Attributes:
        anchor: row of the features, int64.
        partner: row of the features, or of `keys` where those were given, int64.
        same_class: whether the two are of one class, bool.
        valid: whether the pair exists, bool.
    """

    anchor: Tensor
    partner: Tensor
    same_class: Tensor
    valid: Tensor


def mine_pairs(
    features: Tensor,
    labels: Tensor,
    *,
    intra: str | None = "similar",
    inter: str | None = "similar",
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_offset: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Pairs:
    """Pair every image with one of its own class and one of another class (paper, section 3.2).

    Distances are Euclidean, of detached features, in float32 at least, whatever autocast or
    `torch.set_float32_matmul_precision` allow. Partners are exact: near neighbours, which a matrix product cannot tell
    apart, are compared by subtraction, and rows far from the others don't affect the partners of these. Ties go to the
    lowest index. Nothing is paired with itself. An image with a negative label has no class: it is never a partner, and
    its own pairs are not valid. A row that is not finite is never chosen; its own pairs stay valid, so that the loss
    turns non-finite where a training loop looks for it. Nothing waits for a GPU, and no shape depends on the data.

    Args:
        features: [B,D], float16, bfloat16, float32 or float64.
        labels: [B], class indices of any integer dtype; negative for no class.
        intra: the partner of the same class: "similar" (nearest), "dissimilar" (farthest), "random", or None for no
            such pairs.
        inter: likewise, the partner of another class.
        keys: [M,D], where partners are searched instead of in `features` (all ranks, a memory of past batches).
        key_labels: [M], the classes of `keys`.
        key_offset: the row of `keys` that holds query 0, the others following, so that no image is paired with
            itself; None if the queries are not in `keys`.
        generator: source of "random" partners, on the features' device; None is torch's default one.
        backend: "dense" (one [B,M] matrix of distances), "tiled" (tile by tile: half the products, and hardly any
            memory beyond the features), "triton" (likewise, in fused kernels on a CUDA device; needs Triton, which
            comes with PyTorch for CUDA), or "auto": "dense" for small batches and under `torch.compile`, else
            "tiled".

    Returns:
        Pairs with P = 2B: rows [0,B) the intra-class pairs in order of their anchors, rows [B,2B) the inter-class
        pairs. P = B if one of the two is None. With `keys`, a pair that is not valid has partner
        `key_offset + anchor`, or 0 without an offset.

    Raises:
        ValueError: an argument's shape, dtype, device or value doesn't fit; the message shows what came.
        TypeError: it is of another type than is written above.

    Examples:
        >>> features = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
        >>> pairs = mine_pairs(features, torch.tensor([7, 7, 7, 3]))
        >>> pairs.partner.tolist()  # nearest of class 7, then nearest of another class
        [1, 0, 1, 3, 3, 3, 3, 2]
        >>> pairs.valid.tolist()  # the only image of class 3 has nobody of its class
        [True, True, True, False, True, True, True, True]
    """
    check_features(features)
    check_labels(labels, features)
    searches = searches_of(intra, inter)
    _check_backend(backend)
    check_generator(generator, features, "features'")

    if keys is not None:
        check_keys(features, labels, keys, key_labels, key_offset)
    elif key_labels is not None or key_offset is not None:
        raise ValueError("key_labels and key_offset need keys, got keys=None")
    return find_pairs(features, labels, searches, keys, key_labels, key_offset, generator, backend)


def find_pairs(
    features: Tensor,
    labels: Tensor,
    searches: tuple[Search, ...],
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_offset: int | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Pairs:
    """`mine_pairs` without its checks, for arguments that were checked; `searches` by `searches_of`."""
    size = features.shape[0]  # not len(): export would take that for a constant
    # All pairs at once, not one kind after the other: small batches cost a GPU as much as there are operations.
    pair = torch.arange(len(searches) * size, device=features.device)
    anchor = pair % size
    labels, offset = labels.long(), key_offset
    if keys is None:
        offset, fallback = 0, anchor
    else:
        keys = keys.detach()
        fallback = torch.zeros_like(anchor) if offset is None else anchor + offset
    if size == 0:
        return Pairs(anchor, anchor, anchor.bool(), anchor.bool())
    key_labels = labels if key_labels is None else key_labels.long()
    found = find(backend, Query(features.detach(), labels, keys, key_labels, offset, searches), generator)
    valid = found.valid.flatten()
    return Pairs(
        anchor=anchor,
        partner=found.partner.flatten().where(valid, fallback),
        same_class=pair < (size if searches[0].same_class else 0),
        valid=valid,
    )


def random_pairs(labels: Tensor, num_pairs: int, *, generator: torch.Generator | None = None) -> Pairs:
    """Pairs drawn without regard to class, the paper's "Random" construction (section 4.1, ablation).

    Both images are drawn uniformly, with replacement between pairs; the two of a pair differ.

    Args:
        labels: [B], class indices of any integer dtype.
        num_pairs: P, how many pairs to draw.
        generator: source of randomness, on the labels' device; None is torch's default one.

    Returns:
        Pairs with P = `num_pairs`. None is valid if B = 1, nor those of images with a negative label, of no class.

    Raises:
        ValueError: labels are no integer vector, there are none, num_pairs is negative, or generator on another device.
        TypeError: labels are no tensor, num_pairs no int or generator no generator.

    Examples:
        >>> pairs = random_pairs(torch.tensor([0, 0, 1]), 4, generator=torch.Generator().manual_seed(0))
        >>> bool((pairs.anchor != pairs.partner).all())
        True
    """
    check_integer(labels)
    check_int(num_pairs, "num_pairs")
    check_generator(generator, labels, "labels'")
    size = labels.shape[0]
    if size == 0 or num_pairs < 0:
        raise ValueError(f"need at least one label and num_pairs >= 0, got {size} labels and num_pairs={num_pairs}")
    labels = labels.long()  # torch before 2.6 selects from few other dtypes
    anchor = torch.randint(size, (num_pairs,), generator=generator, device=labels.device)
    step = torch.randint(1, max(size, 2), (num_pairs,), generator=generator, device=labels.device)
    partner = (anchor + step) % size
    of_anchor, of_partner = labels[anchor], labels[partner]
    valid = (anchor != partner) & (of_anchor >= 0) & (of_partner >= 0)
    return Pairs(anchor, partner, (of_anchor == of_partner) & (of_anchor >= 0), valid)


def check_pairs(pairs: Pairs, features: Tensor, size: int, keys: Tensor | None = None) -> None:
    """Raise unless `pairs` are tensors [P] of their dtypes on the device of `features`, and rows where one may look.

    Anchors are rows of `features`; partners of `keys`, or without keys of `size` images.
    """
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs must be a Pairs, got {type(pairs).__name__}")
    for name, rows in (("pairs.anchor", pairs.anchor), ("pairs.partner", pairs.partner)):
        check_integer(rows, name)
        check_device(rows, name, features, "features")
    if not isinstance(pairs.valid, Tensor):
        raise TypeError(f"pairs.valid must be a tensor [P], got {describe(pairs.valid)}")
    check_device(pairs.valid, "pairs.valid", features, "features")
    if pairs.anchor.shape != pairs.partner.shape or pairs.valid.shape != pairs.anchor.shape:
        raise ValueError(
            f"anchor, partner and valid of pairs must be [P], got {describe(pairs.anchor)}, {describe(pairs.partner)} "
            f"and {describe(pairs.valid)}"
        )
    if pairs.valid.dtype != torch.bool or {pairs.anchor.dtype, pairs.partner.dtype} - {torch.int64, torch.int32}:
        raise ValueError(
            f"anchor and partner of pairs must be int64 and valid bool, got {describe(pairs.anchor)}, "
            f"{describe(pairs.partner)} and {describe(pairs.valid)}"
        )
    if keys is not None:
        size, of_partners = keys.shape[0], f"keys {describe(keys)}"
    else:
        of_partners = f"features {describe(features)}" + (" of all ranks" if size != features.shape[0] else "")
    for name, rows, count, of_what in (
        ("pairs.anchor", pairs.anchor, features.shape[0], f"features {describe(features)}"),
        ("pairs.partner", pairs.partner, size, of_partners),
    ):
        if is_eager_cpu(rows) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            wrong = int(rows.max()) if int(rows.min()) >= 0 else int(rows.min())
            raise ValueError(f"{name} must be rows of {of_what}, got {describe(rows)} with {wrong}")


def searches_of(intra: str | None, inter: str | None) -> tuple[Search, ...]:
    """The searches that `intra` and `inter` ask for; ValueError if one is unknown or there is none."""
    for name, how in (("intra", intra), ("inter", inter)):
        if how is not None and how not in SEARCHES:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, SEARCHES))} or None, got {how!r}")
    searches = tuple(Search(how, same) for how, same in ((intra, True), (inter, False)) if how is not None)
    if not searches:
        raise ValueError("intra and inter are both None: that leaves no pairs to mine")
    return searches


def _check_backend(name: str) -> None:
    known = ("auto", *BACKENDS)
    if name not in known:
        raise ValueError(f"backend must be one of {', '.join(map(repr, known))}, got {name!r}")


def check_keys(
    features: Tensor, labels: Tensor, keys: Tensor, key_labels: Tensor | None, key_offset: int | None
) -> None:
    if key_labels is None:
        raise ValueError("keys need key_labels, got key_labels=None")
    check_features(keys, "keys", features.shape[1])
    check_device(keys, "keys", features, "features")
    check_labels(key_labels, keys, "key_labels", "keys")
    if keys.shape[0] == 0:
        raise ValueError("keys must have at least one row to find partners in, got none")
    room = keys.shape[0] - features.shape[0]
    if key_offset is not None:
        check_int(key_offset, "key_offset")
        if not 0 <= key_offset <= room:
            raise ValueError(
                f"key_offset says where the {features.shape[0]} queries sit among the {keys.shape[0]} keys and must be "
                f"in [0, {room}], got {key_offset}; use None if they are not there"
            )
        if is_eager_cpu(labels) and is_eager_cpu(key_labels):
            _check_offset(labels.long(), key_labels.long(), key_offset)


def _check_offset(labels: Tensor, key_labels: Tensor, key_offset: int) -> None:
    """Raise ValueError if other images are where the queries should be: one would be paired with itself, unnoticed."""
    there = key_labels[key_offset : key_offset + labels.shape[0]]
    if not torch.equal(there, labels):
        row = int((there != labels).nonzero()[0])
        raise ValueError(
            f"key_offset={key_offset} says that row {key_offset + row} of keys is query {row}, but key_labels has "
            f"{int(there[row])} there, and labels {int(labels[row])}; use None if the queries are not in keys"
        )
