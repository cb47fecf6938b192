"""API-Net once more, from the formulas, slowly and in float64: what the tests compare the package with."""

import numpy as np
import torch


def candidates(labels, key_labels, finite, same_class, offset):
    """[B,M] bool: the candidate mask, of arrays; `offset` is None where queries are not among the keys."""
    same = labels[:, None] == key_labels
    allowed = (same == same_class) & (labels[:, None] >= 0) & (key_labels >= 0) & finite
    if offset is not None:
        queries = np.arange(len(labels))
        allowed[queries, queries + offset] = False
    return allowed


def head(module, x, labels, partners, margin=0.05, valid=None, mutual_of=None, single=False):
    """Logits and loss of the published head with the weights of a module, without dropout, pair by pair.

    `partners` has one [B] per kind of pair. Pairs that are not `valid` [P] are left out. Of the ablation are another
    mutual vector of two images, and the `single` gate of both.
    """

    def linear(layer, value):
        return layer.weight @ value + layer.bias

    def published(a, b):
        return linear(module.mutual.fc2, linear(module.mutual.fc1, torch.cat([a, b])))

    mutual_of = mutual_of or published
    rows, seconds = [], []  # of (label, own features, other's features)
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
