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


def mutual_of_pair(module, name, a, b):
    """m, as the formulas have it."""
    if name in ("mlp", "weighted"):
        output = module.fc2.weight @ (module.fc1.weight @ torch.cat([a, b]) + module.fc1.bias) + module.fc2.bias
        if name == "mlp":
            return output
        first, second = output.exp()
        return (first * a + second * b) / (first + second)
    if name == "bilinear":  # the sketch of the outer product
        (slot_a, slot_b), (sign_a, sign_b) = module.slots, module.signs
        slots, products = (slot_a[:, None] + slot_b) % len(a), torch.outer(sign_a * a, sign_b * b)
        return torch.zeros_like(a).index_add(0, slots.flatten(), products.flatten())
    return {"individual": torch.ones_like(a), "sum": a + b, "product": a * b, "square_diff": (a - b) ** 2}[name]


def head(module, x, labels, partners, margin=0.05, valid=None, mutual="mlp", single=False):
    """Logits and loss of the published head with the weights of a module, without dropout, pair by pair.

    `partners` has one [B] per kind of pair. Pairs that are not `valid` [P] are left out. Of the ablation are another
    `mutual` vector of two images, and the `single` gate of both.
    """

    def linear(layer, value):
        return layer.weight @ value + layer.bias

    rows, seconds = [], []  # of (label, own features, other's features)
    for kind, partner in enumerate(partners):
        for a, b in enumerate(partner.tolist()):
            if valid is not None and not valid[kind * len(x) + a]:
                continue
            m = mutual_of_pair(module.mutual, mutual, x[a], x[b])
            gate_a, gate_b = (torch.sigmoid(m if single else m * image) for image in (x[a], x[b]))
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
