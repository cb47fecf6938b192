"""Partners that were mined, against brute force: for every backend of `mine_pairs`."""

import numpy as np
import torch
from reference import candidates
from torch import Tensor
from torch.testing import assert_close

from apinet_head import Pairs, mine_pairs

HOWS = ("similar", "dissimilar", "random")


def check(features: Tensor, labels: Tensor, *, intra: str = "similar", inter: str = "similar", **keys) -> Pairs:
    """Mine, and compare both halves with brute force."""
    before = features.clone()
    pairs = mine_pairs(features, labels, intra=intra, inter=inter, **keys)
    assert_close(features, before, rtol=0, atol=0, equal_nan=True, msg="mining changed its input")
    exact = "large" not in keys.pop("backend", "")  # there only the few best candidates are compared again
    check_pairs(pairs, features, labels, intra=intra, inter=inter, exact=exact, **keys)
    return pairs


def check_pairs(pairs, features, labels, *, intra, inter, keys=None, key_labels=None, key_offset=None, exact=True):
    """Assert that pairs are as `mine_pairs` promises, by brute force: of each kind that is not None, one per image.

    A partner may differ from the best one only by the rounding of a distance by subtraction in float32 (float64); if
    not `exact`, by that of a matrix product about the middle of the rows.
    """
    if keys is None:
        keys, key_labels, key_offset = features, labels, 0
    size, kinds = len(features), [(how, same) for how, same in ((intra, True), (inter, False)) if how is not None]
    assert [field.dtype for field in pairs] == [torch.int64, torch.int64, torch.bool, torch.bool]
    assert pairs.anchor.tolist() == [*range(size)] * len(kinds)
    assert pairs.same_class.tolist() == [same for _, same in kinds for _ in range(size)]
    x, k = features.detach().double().numpy(), keys.detach().double().numpy()
    finite = np.isfinite(k).all(1)
    # Squares of the largest and the smallest float64 would be no numbers.
    largest = np.abs(np.concatenate([k[finite].ravel(), x[np.isfinite(x)], [np.finfo(float).tiny]])).max()
    x, k = x / largest, k / largest
    middle = np.median(k[finite], 0) if finite.any() else 0
    spread = np.quantile(((k[finite] - middle) ** 2).sum(1), 0.8) if finite.any() else 0
    eps = torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps

    labels, key_labels = labels.long().numpy(), key_labels.long().numpy()
    fallback = np.arange(size) + key_offset if key_offset is not None else np.zeros(size, dtype=int)
    for row, (how, same) in enumerate(kinds):
        partner, valid = (field[row * size : (row + 1) * size].numpy() for field in (pairs.partner, pairs.valid))
        allowed = candidates(labels, key_labels, finite, same, key_offset)
        np.testing.assert_array_equal(valid, allowed.any(1))
        np.testing.assert_array_equal(partner[~valid], fallback[~valid])
        rows, chosen = np.flatnonzero(valid), partner[valid]
        assert allowed[rows, chosen].all(), f"rows {rows[~allowed[rows, chosen]]} got no candidates"
        if how == "random":
            continue

        with np.errstate(all="ignore"):
            distance = np.stack([((k - query) ** 2).sum(1) for query in x])
        rows, chosen = (some[np.isfinite(x[rows]).all(1)] for some in (rows, chosen))
        nearest, farthest = (np.where(allowed, distance, worst)[rows] for worst in (np.inf, -np.inf))
        best = nearest.min(1) if how == "similar" else farthest.max(1)
        norm = best if exact else best + spread + ((x[rows] - middle) ** 2).sum(1)
        wrong = np.abs(distance[rows, chosen] - best) > 16 * eps * norm
        assert not wrong.any(), f"rows {rows[wrong]} got {chosen[wrong]}"


def brute_force(features: Tensor, labels: Tensor) -> Tensor:
    """The partners [2,B] by subtraction in float64."""
    x = features.double()
    distance = torch.stack([(x - row).square().sum(1) for row in x])
    same = labels[:, None] == labels
    own = distance.masked_fill(~same | torch.eye(len(x), dtype=torch.bool), torch.inf)
    return torch.stack([own.argmin(1), distance.masked_fill(same, torch.inf).argmin(1)])
