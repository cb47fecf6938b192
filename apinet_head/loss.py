"""The loss: cross-entropy of all gated features, and ranking of own gate above the other's (paper, section 3.2)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from apinet_head._checks import FLOATS, check_dense, check_device, check_integer, check_number, describe

if TYPE_CHECKING:
    from apinet_head.head import APIOutput


class LossTerms(NamedTuple):
    """Scalars: total = cross_entropy + rank_weight * ranking."""

    total: Tensor
    cross_entropy: Tensor
    ranking: Tensor


def api_loss(
    output: "APIOutput", *, margin: float = 0.05, rank_weight: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """The scalar to minimise: `api_loss_terms(...).total`.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> api_loss(output).shape
        torch.Size([])
    """
    return api_loss_terms(output, margin=margin, rank_weight=rank_weight, label_smoothing=label_smoothing).total


def api_loss_terms(
    output: "APIOutput", *, margin: float = 0.05, rank_weight: float = 1.0, label_smoothing: float = 0.0
) -> LossTerms:
    """The loss and its two terms.

    With p the softmax of a row's logits at its label (paper, equations 4 and 5):

        cross_entropy = mean of -log p over all 4P rows
        ranking = mean of max(0, p_other - p_self + margin) over the 2P rows

    Rows that are not valid count for nothing; if none is valid, all is 0, with zero gradients. Computed in float32
    at least, under autocast too. Of a head with gather=True, the mean over the ranks is the loss of the whole batch.

    Args:
        output: of an APIHead with a classifier, logits [2P,C]; labels of valid rows in [0,C).
        margin: by how much the probability under the own gate should exceed the one under the other's gate.
        rank_weight: weight of the ranking term (lambda in the paper).
        label_smoothing: share of the target spread over all classes, in the cross-entropy only.

    Raises:
        ValueError: logits_self and logits_other differ in shape, labels or valid don't match them, a label is not in
            [0,C) (seen on a CPU; a GPU stops by itself), or margin, rank_weight or label_smoothing is out of range.
        TypeError: output is no APIOutput of tensors, or one of the others no number.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> terms = api_loss_terms(output, rank_weight=0.5)
        >>> bool(torch.isclose(terms.total, terms.cross_entropy + 0.5 * terms.ranking))
        True
    """
    _check(output)
    for name, weight in (("margin", margin), ("rank_weight", rank_weight)):
        check_number(weight, name)
    check_number(label_smoothing, "label_smoothing", 0, 1)
    valid = output.valid
    labels = output.labels.long().where(valid, 0)[:, None]
    rows = valid.sum().clamp(min=1) if output.num_rows is None else output.num_rows

    def mean(per_row: Tensor) -> Tensor:
        return per_row.where(valid, 0).sum() / rows.to(per_row.dtype)

    def log_probabilities(logits: Tensor) -> Tensor:
        # Masked before, not only after: whatever an invalid row holds, infinity included, its gradient is zero.
        return logits.masked_fill(~valid[:, None], 0).to(_at_least_float32(logits.dtype)).log_softmax(1)

    own, other = log_probabilities(output.logits_self), log_probabilities(output.logits_other)
    own_label, other_label = _at(labels, own), _at(labels, other)
    cross_entropy = -mean(own_label + other_label) / 2
    if label_smoothing:
        uniform = -mean(own.mean(1) + other.mean(1)) / 2
        cross_entropy = (1 - label_smoothing) * cross_entropy + label_smoothing * uniform
    ranking = mean((other_label.exp() - own_label.exp() + margin).relu())
    return LossTerms(cross_entropy + rank_weight * ranking, cross_entropy, ranking)


def _at(labels: Tensor, rows: Tensor) -> Tensor:
    """rows[i, labels[i]]."""
    try:
        return rows.gather(1, labels).squeeze(1)
    except RuntimeError as error:
        outside = (labels < 0) | (labels >= rows.shape[1])
        if rows.device.type != "cpu" or not outside.any():  # then it is another error
            raise
        raise ValueError(
            f"labels of valid rows must be in [0, {rows.shape[1]}) for logits [{rows.shape[0]}, {rows.shape[1]}], got "
            f"{labels[outside].tolist()[0]}"
        ) from error


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(output: "APIOutput") -> None:
    if not (isinstance(output, tuple) and hasattr(output, "num_rows")):
        raise TypeError(f"the loss is of an APIOutput, got {type(output).__name__}: call the head with labels")
    own, other, labels, valid = output[:4]
    for name, tensor in (("logits_self", own), ("logits_other", other), ("valid", valid)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
        check_dense(tensor, name)
    if own.dtype not in FLOATS or other.dtype not in FLOATS:
        raise ValueError(f"logits must be of a floating point dtype, got {describe(own)} and {describe(other)}")
    if own.ndim != 2 or own.shape != other.shape:
        raise ValueError(f"logits must be two [2P, C], got {describe(own)} and {describe(other)}")
    check_integer(labels)
    if not own.shape[:1] == labels.shape == valid.shape:
        raise ValueError(
            f"labels and valid must be [2P] for logits {describe(own)}, got {describe(labels)} and {describe(valid)}"
        )
    if valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool, got {describe(valid)}")
    for name, tensor in (("logits_other", other), ("labels", labels), ("valid", valid)):
        check_device(tensor, name, own, "logits_self")
    rows = output.num_rows
    if rows is not None and not (isinstance(rows, Tensor) and rows.ndim == 0):
        raise ValueError(f"num_rows must be a scalar tensor or None, got {describe(rows)}")
