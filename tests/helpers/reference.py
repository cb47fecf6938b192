"""API-Net once more, from the formulas, slowly and in float64: what the tests compare the package with."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def squared_distances(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """[B,M], by subtraction, one query at a time."""
    with np.errstate(all="ignore"):
        return np.stack([((keys - query) ** 2).sum(1) for query in queries])


def candidates(
    labels: np.ndarray, key_labels: np.ndarray, finite: np.ndarray, same_class: bool, offset: int | None
) -> np.ndarray:
    """[B,M] bool: the candidate mask."""
    same = labels[:, None] == key_labels
    allowed = (same == same_class) & (labels[:, None] >= 0) & (key_labels >= 0) & finite
    if offset is not None:
        queries = np.arange(len(labels))
        allowed[queries, queries + offset] = False
    return allowed


def check_partners(
    partner: Tensor,
    valid: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    how: str,
    same_class: bool,
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    offset: int | None = None,
    exact: bool = True,
) -> None:
    """Assert that partners [B] are as `mine_pairs` promises, by brute force.

    A partner may differ from the best one only by the rounding of a distance by subtraction in float32 (float64); if
    not `exact`, by that of a matrix product about the middle of the rows.
    """
    if keys is None:
        keys, key_labels, offset = features, labels, 0
    x, k = features.detach().double().numpy(), keys.detach().double().numpy()
    finite = np.isfinite(k).all(1)
    # Squares of the largest and the smallest float64 would be no numbers.
    largest = np.abs(np.concatenate([k[finite].ravel(), x[np.isfinite(x)], [np.finfo(float).tiny]])).max()
    x, k = x / largest, k / largest
    allowed = candidates(labels.long().numpy(), key_labels.long().numpy(), finite, same_class, offset)
    np.testing.assert_array_equal(valid.numpy(), allowed.any(1))
    fallback = np.arange(len(x)) + offset if offset is not None else np.zeros(len(x), dtype=int)
    np.testing.assert_array_equal(partner.numpy()[~valid.numpy()], fallback[~valid.numpy()])
    rows, chosen = np.flatnonzero(valid.numpy()), partner.numpy()[valid.numpy()]
    assert allowed[rows, chosen].all(), f"rows {rows[~allowed[rows, chosen]]} got no candidates"
    if how == "random":
        return

    distance = squared_distances(x, k)
    middle = np.median(k[finite], 0) if finite.any() else 0
    spread = np.quantile(((k[finite] - middle) ** 2).sum(1), 0.8) if finite.any() else 0
    eps = torch.finfo(torch.promote_types(features.dtype, torch.float32)).eps
    rows, chosen = (some[np.isfinite(x[rows]).all(1)] for some in (rows, chosen))
    nearest, farthest = (np.where(allowed, distance, worst)[rows] for worst in (np.inf, -np.inf))
    best = nearest.min(1) if how == "similar" else farthest.max(1)
    norm = best if exact else best + spread + ((x[rows] - middle) ** 2).sum(1)
    wrong = np.abs(distance[rows, chosen] - best) > 16 * eps * norm
    assert not wrong.any(), f"rows {rows[wrong]} got {chosen[wrong]}"


def head(
    module: nn.Module,
    x: Tensor,
    labels: Tensor,
    partners: list[Tensor],
    margin: float = 0.05,
    valid: Tensor | None = None,
    mutual_of: Callable[[Tensor, Tensor], Tensor] | None = None,
    single: bool = False,
) -> dict[str, Tensor]:
    """Logits and loss of the published head with the weights of a module, without dropout, pair by pair.

    `partners` has one [B] per kind of pair. Pairs that are not `valid` [P] are left out. Of the ablation are another
    mutual vector of two images, and the `single` gate of both.
    """

    def linear(layer: nn.Module, value: Tensor) -> Tensor:
        return layer.weight @ value + layer.bias

    def published(a: Tensor, b: Tensor) -> Tensor:
        return linear(module.mutual.fc2, linear(module.mutual.fc1, torch.cat([a, b])))

    mutual_of = mutual_of or published
    rows: list[tuple[int, Tensor, Tensor]] = []
    seconds: list[tuple[int, Tensor, Tensor]] = []
    for kind, partner in enumerate(partners):
        for a, b in enumerate(partner.tolist()):
            if valid is not None and not valid[kind * len(x) + a]:
                continue
            mutual = mutual_of(x[a], x[b])
            gate_a, gate_b = (torch.sigmoid(mutual if single else mutual * image) for image in (x[a], x[b]))
            rows.append((int(labels[a]), x[a] + x[a] * gate_a, x[a] + x[a] * gate_b))
            seconds.append((int(labels[b]), x[b] + x[b] * gate_b, x[b] + x[b] * gate_a))
    rows += seconds
    own = torch.stack([linear(module.classifier, features) for _, features, _ in rows])
    other = torch.stack([linear(module.classifier, features) for _, _, features in rows])
    cross_entropy, ranking = x.new_zeros(()), x.new_zeros(())
    for (label, _, _), row_own, row_other in zip(rows, own, other, strict=True):
        p_own, p_other = (row.exp()[label] / row.exp().sum() for row in (row_own, row_other))
        cross_entropy = cross_entropy - (p_own.log() + p_other.log()) / (2 * len(rows))
        ranking = ranking + torch.clamp(p_other - p_own + margin, min=0) / len(rows)
    return {"own": own, "other": other, "cross_entropy": cross_entropy, "ranking": ranking,
            "loss": cross_entropy + ranking}  # fmt: skip


def with_past(features: Tensor, labels: Tensor, past: list[tuple[Tensor, Tensor]], size: int) -> dict[str, Any]:
    """The keys of a head with a memory: the batch, then the last `size` rows of the batches of the past."""
    old, old_labels = (torch.cat(rows)[-size:] for rows in zip((features[:0], labels[:0]), *past, strict=True))
    keys = torch.cat([features, old.detach()])
    return {"keys": keys, "key_labels": torch.cat([labels, old_labels]), "key_offset": 0}
