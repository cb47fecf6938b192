"""Which images to compare: the pairs that API-Net trains on (paper, section 3.2)."""

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
    check_valid,
    describe,
)
from apinet_head.mining import BACKENDS, Query, Search, find
from apinet_head.mining.query import is_eager_cpu

SEARCHES = ("similar", "dissimilar", "random")


class Pairs(NamedTuple):
    """P pairs of images, as tensors [P] on the features' device.

    Attributes:
        anchor: int64, row of the features.
        partner: int64, row of the features, or of `keys` if these were given.
        same_class: bool, whether the two images are of one class.
        valid: bool, whether the pair exists. One without a possible partner has its anchor as partner, so that gathers
            stay in range.
    """

    anchor: Tensor
    partner: Tensor
    same_class: Tensor
    valid: Tensor


class Keys(NamedTuple):
    """Where partners are searched: K rows of features, such as the batch itself, then those of a memory."""

    features: Tensor  # [K,D]
    labels: Tensor  # [K+N] int64
    offset: int | None  # the row of query 0
    past: Tensor | None = None  # [N,D]

    def is_batch(self, features: Tensor) -> bool:
        """Whether these are just the features of the queries, so that distances are symmetric."""
        return self.features is features and self.offset == 0 and self.past is None

    def take(self, rows: Tensor) -> Tensor:
        """Rows of all keys, without concatenating: the memory may be much larger than the batch."""
        if self.past is None:
            return self.features.index_select(0, rows)
        size = self.features.shape[0]
        recent = self.features.index_select(0, rows.clamp(max=size - 1))
        past = self.past.index_select(0, (rows - size).clamp(min=0))
        return recent.where((rows < size)[:, None], past.to(recent.dtype))


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

    Distances are Euclidean, between detached features, in float32 at least, regardless of autocast and
    `torch.set_float32_matmul_precision`. Partners are exact: near neighbours are compared by subtraction, which avoids
    cancellation, and outliers do not affect other rows; large searches on other devices than CPUs compare the 8 best
    candidates of each query by subtraction. Ties go to the lowest index. No image is paired with itself. A
    non-finite row is never chosen, but its own pairs stay valid, so that the loss becomes non-finite. Nothing
    synchronises with a GPU, and no shape depends on the data.

    Args:
        features: [B,D], floating point.
        labels: [B], class indices, integer dtype. A negative label means "no class": the image is never a partner, and
            its own pairs are not valid.
        intra: partner of the same class: "similar" (nearest), "dissimilar" (farthest), "random" or None (no such
            pairs).
        inter: partner of another class, likewise.
        keys: [M,D], searched instead of `features`: features of other ranks or of past batches.
        key_labels: [M], classes of the keys.
        key_offset: the row of `keys` that is query 0, so that no row is paired with itself; None if the queries are not
            in `keys`.
        generator: for "random" partners, on the features' device; None for torch's default generator.
        backend: "dense" (one [B,M] matrix of distances), "tiled" (half of the products, almost no memory beyond the
            features), "triton" (fused kernels for CUDA), or "auto": "triton" on GPUs of compute capability 9.0, and
            elsewhere "dense" for small batches and under `torch.compile`, "tiled" for others.

    Returns:
        Pairs with P = 2B: rows [0,B) the intra-class pairs in the order of their anchors, rows [B,2B) the inter-class
        pairs; P = B if one of the two is None. With `keys`, a pair that is not valid has partner `key_offset + anchor`,
        or 0 without an offset.

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit; the message shows what was passed.
        TypeError: an argument has the wrong type.

    Examples:
        >>> features = torch.tensor([[0.0], [1.0], [5.0], [9.0]])
        >>> pairs = mine_pairs(features, torch.tensor([7, 7, 7, 3]))
        >>> pairs.partner.tolist()  # nearest of class 7, then nearest of another class
        [1, 0, 1, 3, 3, 3, 3, 2]
        >>> pairs.valid.tolist()  # class 3 has a single image
        [True, True, True, False, True, True, True, True]
    """
    check_features(features)
    check_labels(labels, features)
    searches = searches_of(intra, inter)
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    check_generator(generator, features, "features'")
    table = checked_keys(features, labels, keys, key_labels, key_offset)
    return find_pairs(features, labels.long(), searches, table, generator, backend)


def find_pairs(
    features: Tensor,
    labels: Tensor,
    searches: tuple[Search, ...],
    table: Keys,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Pairs:
    """`mine_pairs` of checked arguments, with int64 labels."""
    size = features.shape[0]  # not len(), which export makes a constant
    # All pairs at once: on a GPU, the time for small batches is the number of operations.
    pair = torch.arange(len(searches) * size, device=features.device)
    anchor = pair % size
    if size == 0:
        return Pairs(anchor, anchor, anchor.bool(), anchor.bool())
    keys = None
    if not table.is_batch(features):
        keys = table.features.detach() if table.past is None else torch.cat([table.features.detach(), table.past])
    query = Query(features.detach(), labels, keys, table.labels, table.offset, searches)
    fallback = anchor
    if table.offset != 0:
        fallback = torch.zeros_like(anchor) if table.offset is None else anchor + table.offset
    found = find(backend, query, generator)
    valid = found.valid.flatten()
    partner = found.partner.flatten().where(valid, fallback)
    return Pairs(anchor, partner, pair < (size if searches[0].same_class else 0), valid)


def random_pairs(labels: Tensor, num_pairs: int, *, generator: torch.Generator | None = None) -> Pairs:
    """Pairs of two different images, drawn uniformly and regardless of class (paper, section 4.1: "Random").

    Args:
        labels: [B], class indices, integer dtype.
        num_pairs: P, number of pairs.
        generator: on the labels' device; None for torch's default generator.

    Returns:
        Pairs with P = `num_pairs`; not valid if B = 1 or if a label of the two is negative.

    Raises:
        ValueError: labels are not an integer vector, or empty; num_pairs is negative; generator is on another device.
        TypeError: an argument has the wrong type.

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
    labels = labels.long()  # few operations support all integer dtypes
    anchor = torch.randint(size, (num_pairs,), generator=generator, device=labels.device)
    step = torch.randint(1, max(size, 2), (num_pairs,), generator=generator, device=labels.device)
    partner = (anchor + step) % size
    of_anchor, of_partner = labels[anchor], labels[partner]
    valid = (anchor != partner) & (of_anchor >= 0) & (of_partner >= 0)
    return Pairs(anchor, partner, (of_anchor == of_partner) & (of_anchor >= 0), valid)


def check_pairs(pairs: Pairs, features: Tensor, keys: Tensor) -> None:
    """Raise unless `pairs` are tensors [P] with rows of `features` as anchors and rows of `keys` as partners."""
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs must be a Pairs, got {type(pairs).__name__}")
    for name, rows, table in (("pairs.anchor", pairs.anchor, features), ("pairs.partner", pairs.partner, keys)):
        check_integer(rows, name)
        check_device(rows, name, features, "features")
        if is_eager_cpu(rows) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < table.shape[0]:
            wrong = int(rows.max()) if int(rows.min()) >= 0 else int(rows.min())
            raise ValueError(f"{name} must be rows of {describe(table)}, got {wrong}")
    if pairs.anchor.shape != pairs.partner.shape:
        raise ValueError(f"pairs must be [P], got {describe(pairs.anchor)} and {describe(pairs.partner)}")
    check_valid(pairs.valid, pairs.anchor, "pairs.valid")


def searches_of(intra: str | None, inter: str | None) -> tuple[Search, ...]:
    """The searches for `intra` and `inter`; raises ValueError for an unknown value or if both are None."""
    for name, how in (("intra", intra), ("inter", inter)):
        if how is not None and how not in SEARCHES:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, SEARCHES))} or None, got {how!r}")
    if intra is None and inter is None:
        raise ValueError("intra and inter are both None: there are no pairs to mine")
    same_class = () if intra is None else (Search(intra, same_class=True),)
    return same_class if inter is None else (*same_class, Search(inter, same_class=False))


def checked_keys(
    features: Tensor, labels: Tensor, keys: Tensor | None, key_labels: Tensor | None, key_offset: int | None
) -> Keys:
    """The given keys, or else the batch; raises unless they fit the features and labels."""
    if keys is None and key_labels is None and key_offset is None:
        return Keys(features, labels.long(), 0)
    if keys is None or key_labels is None:
        name = "keys" if keys is not None else "key_labels" if key_labels is not None else "key_offset"
        raise ValueError(f"keys and key_labels need each other, and key_offset needs both, got only {name}")
    check_features(keys, "keys", features.shape[1])
    check_device(keys, "keys", features, "features")
    check_labels(key_labels, keys, "key_labels", "keys")
    size, room = features.shape[0], keys.shape[0] - features.shape[0]
    if keys.shape[0] == 0:
        raise ValueError(f"keys must have at least one row, got {describe(keys)}")
    if key_offset is None:
        return Keys(keys, key_labels.long(), None)
    check_int(key_offset, "key_offset")
    if not 0 <= key_offset <= room:
        raise ValueError(
            f"key_offset, the row of the {keys.shape[0]} keys that is the first of the {size} queries, must be in "
            f"[0, {room}], got {key_offset}; use None if the queries are not in keys"
        )
    # A wrong offset would silently pair images with themselves.
    if is_eager_cpu(labels) and is_eager_cpu(key_labels):
        there = key_labels[key_offset : key_offset + size]
        if not torch.equal(there.long(), labels.long()):
            row = int((there != labels).nonzero()[0])
            raise ValueError(
                f"key_offset={key_offset} says that row {key_offset + row} of keys is query {row}, but key_labels has "
                f"{int(there[row])} there, and labels {int(labels[row])}; use None if the queries are not in keys"
            )
    return Keys(keys, key_labels.long(), key_offset)
