"""The loss: cross-entropy of all gated features, and ranking of own gate above the other's (paper, section 3.2)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apinet_head._checks import (
    FLOATS,
    check_dense,
    check_device,
    check_int,
    check_integer,
    check_number,
    describe,
    shown,
)
from apinet_head._linear_loss import Settings, Targets, at, linear_loss
from apinet_head.distributed import world_size
from apinet_head.mutual import is_plain_linear

if TYPE_CHECKING:
    from apinet_head.head import APIOutput


class LossTerms(NamedTuple):
    """Scalars: total = cross_entropy + rank_weight * ranking."""

    total: Tensor
    cross_entropy: Tensor
    ranking: Tensor


def api_loss(
    output: "APIOutput",
    *,
    margin: float = 0.05,
    rank_weight: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The scalar to minimise: `api_loss_terms(...).total`.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> api_loss(output).shape
        torch.Size([])
    """
    return api_loss_terms(
        output, margin=margin, rank_weight=rank_weight, label_smoothing=label_smoothing, class_weight=class_weight
    ).total


def api_loss_terms(
    output: "APIOutput",
    *,
    margin: float = 0.05,
    rank_weight: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> LossTerms:
    """The loss and its two terms.

    With p the softmax of a row's logits at its label (paper, equations 4 and 5):

        cross_entropy = mean of -log p over all 4P rows
        ranking = mean of max(0, p_other - p_self + margin) over the 2P rows

    Rows that are not valid, or whose label is negative, count for nothing; if no row counts, all is 0, with zero
    gradients. Computed in float32 at least, under autocast too. Of a head with gather=True, the mean over the ranks is
    the loss of the whole batch; with class weights all ranks of the default process group must then call the loss, for
    they add up the weights of their rows.

    Args:
        output: of an APIHead with a classifier, logits [2P,C]; labels of valid rows in [0,C).
        margin: by how much the probability under the own gate should exceed the one under the other's gate.
        rank_weight: weight of the ranking term (lambda in the paper).
        label_smoothing: share of the target spread over all classes, in the cross-entropy only.
        class_weight: [C], weights of the classes in the cross-entropy only, which is a weighted mean, as
            F.cross_entropy's with weight=. They get no gradient.

    Raises:
        ValueError: logits_self and logits_other differ in shape, or are none, as the head has no classifier; labels or
            valid don't match them, a label is not below C (seen on a CPU; a GPU stops by itself), or margin,
            rank_weight, label_smoothing or class_weight is out of range.
        TypeError: output is no APIOutput of tensors, or one of the others no number.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> terms = api_loss_terms(output, rank_weight=0.5)
        >>> bool(torch.isclose(terms.total, terms.cross_entropy + 0.5 * terms.ranking))
        True
    """
    _check(output)
    settings = _settings(margin, rank_weight, label_smoothing, class_weight)
    return _of_logits(*output[:4], output.num_rows, settings)


class APILoss(nn.Module):
    """`api_loss` as a module, which a head can also take as `criterion=`: then logits need not exist all at once.

    With many classes, the logits of all rows [4P,C] are what a step's memory goes to. `APILoss(rows=64)` lets 64 rows
    of them exist at a time. For a classifier that is an nn.Linear and nothing more their gradients are made in the
    forward pass, and the weight's is summed up in one buffer. Then only `total` has a gradient, for a single backward
    pass: `cross_entropy` and `ranking` are there to be looked at, with requires_grad=False. Any other classifier runs
    part by part under torch.utils.checkpoint, so once more in the backward pass; it must treat each row by itself.
    Under the transforms of torch.func all logits exist at once, whatever `rows`.

    Args:
        margin: see `api_loss_terms`.
        rank_weight: likewise.
        label_smoothing: likewise.
        class_weight: likewise; a buffer, which moves with the module and is in its state dict.
        rows: of logits that exist at a time, where a head is given this as criterion=; a row under its own gate and
            the same under the other's gate go together, so 2 exist at least. None for all.

    Raises:
        ValueError: a number is out of range, or class_weight no [C].
        TypeError: it is no number, or class_weight no tensor.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> loss = APILoss(class_weight=torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]))
        >>> loss(output).shape, len(loss.terms(output))
        (torch.Size([]), 3)
    """

    class_weight: Tensor | None

    def __init__(
        self,
        margin: float = 0.05,
        rank_weight: float = 1.0,
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.margin, self.rank_weight, self.label_smoothing, class_weight = _settings(
            margin, rank_weight, label_smoothing, class_weight
        )
        self.register_buffer("class_weight", class_weight)
        self.rows = None if rows is None else check_int(rows, "rows", 1)

    def forward(self, output: "APIOutput") -> Tensor:
        """The scalar to minimise."""
        return self.terms(output).total

    def terms(self, output: "APIOutput") -> LossTerms:
        """The loss and its two terms, see `api_loss_terms`."""
        _check(output)
        return _of_logits(*output[:4], output.num_rows, self._settings())

    def of_features(
        self,
        own: Tensor,
        other: Tensor,
        labels: Tensor,
        valid: Tensor,
        num_rows: Tensor | None,
        classify: Callable[[Tensor], Tensor],
    ) -> LossTerms:
        """The loss of gated features [2P,D], as the head calls it; `other` may be `own` itself.

        `classify` maps [N,D] to logits [N,C]; the rest is as in an APIOutput.
        """
        features, settings = (own,) if other is own else (own, other), self._settings()
        if self.rows is None or torch._C._are_functorch_transforms_active():
            return _of_logits(*_classify(features, classify), labels, valid, num_rows, settings)
        dtype, rows = _at_least_float32(own.dtype), max(1, self.rows // len(features))
        plain = classify if isinstance(classify, nn.Linear) and is_plain_linear(classify) else None
        if plain is not None:
            settings = _fit(settings, plain.weight)
        targets = _targets(labels, valid, num_rows, settings.class_weight, dtype)
        if plain is not None:
            return LossTerms(*linear_loss(features, plain, targets, settings, rows))

        def sums_of(targets: Targets, *features: Tensor) -> Tensor:
            own, other = _classify(features, classify)
            return torch.stack(_sums(own, other, targets, _fit(settings, own.T)))

        before, sums = _state(classify), torch.zeros(2, dtype=dtype, device=own.device)
        for first in range(0, len(labels), rows):
            part = slice(first, first + rows)
            of_part = targets._replace(labels=targets.labels[part], valid=targets.valid[part])
            sums = sums + checkpoint(sums_of, of_part, *(tensor[part] for tensor in features), use_reentrant=False)
        if torch.is_grad_enabled() and _state(classify) != before:
            raise ValueError(
                f"rows= runs the classifier in parts, and again in the backward pass, and {type(classify).__name__} "
                "changes its buffers each time (in train mode BatchNorm and spectral_norm do): use APILoss(rows=None)"
            )
        return _mean(sums[0], sums[1], targets, settings)

    def _settings(self) -> Settings:
        return Settings(self.margin, self.rank_weight, self.label_smoothing, self.class_weight)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={getattr(self, name)}" for name in ("margin", "rank_weight", "label_smoothing", "rows")
        )


def _settings(margin: float, rank_weight: float, label_smoothing: float, class_weight: Tensor | None) -> Settings:
    """The settings of a loss, checked."""
    if class_weight is not None:
        if not isinstance(class_weight, Tensor):
            raise TypeError(f"class_weight must be a tensor [C] or None, got {shown(class_weight)}: use torch.tensor()")
        if class_weight.ndim != 1 or class_weight.dtype not in FLOATS:
            raise ValueError(f"class_weight must be [C] of a floating point dtype, got {describe(class_weight)}")
        check_dense(class_weight, "class_weight")
    return Settings(
        check_number(margin, "margin"),
        check_number(rank_weight, "rank_weight"),
        check_number(label_smoothing, "label_smoothing", 0, 1),
        class_weight,
    )


def _of_logits(
    own: Tensor, other: Tensor, labels: Tensor, valid: Tensor, num_rows: Tensor | None, settings: Settings
) -> LossTerms:
    dtype = _at_least_float32(own.dtype)
    settings = _fit(settings, own.T)
    targets = _targets(labels, valid, num_rows, settings.class_weight, dtype)
    return _mean(*_sums(own, other, targets, settings), targets, settings)


def _fit(settings: Settings, classes: Tensor) -> Settings:
    """The settings for `classes` [C,...], which the class weights must fit."""
    if (weight := settings.class_weight) is None:
        return settings
    if weight.shape != classes.shape[:1]:
        raise ValueError(f"class_weight must be [{classes.shape[0]}], a weight per class, got {describe(weight)}")
    check_device(weight, "class_weight", classes, "the logits")
    return settings._replace(class_weight=weight.detach().to(_at_least_float32(classes.dtype)))


def _targets(
    labels: Tensor, valid: Tensor, num_rows: Tensor | None, class_weight: Tensor | None, dtype: torch.dtype
) -> Targets:
    labels = labels.long()  # few other dtypes can be compared
    valid = valid & (labels >= 0)
    labels = labels.where(valid, 0)
    counted = _divisor(valid.sum() if num_rows is None else num_rows, dtype)
    if class_weight is None:
        return Targets(labels, valid, counted, counted)
    weights = at(labels[:, None], class_weight.expand(len(labels), -1))
    weight_sum = weights.where(valid[:, None], 0).sum()
    if num_rows is not None and world_size() > 1:
        dist.all_reduce(weight_sum)
        weight_sum = weight_sum / world_size()
    return Targets(labels, valid, counted, _divisor(weight_sum, dtype))


def _divisor(count: Tensor, dtype: torch.dtype) -> Tensor:
    """By which a sum over so many rows is divided: over none it is to be 0, and its gradient too."""
    return count.to(dtype).masked_fill(count == 0, torch.inf)


def _classify(features: tuple[Tensor, ...], classify: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [N,C] of features [N,D], own and other, or one that is both."""
    rows = torch.cat(features)
    logits = classify(rows)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"the classifier must map [N, D] to [N, C], got {describe(logits)} for N={len(rows)}")
    if len(features) == 1:
        return logits, logits
    own, other = logits.chunk(2)
    return own, other


def _state(classify: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """What tells whether a buffer of a classifier was changed or replaced."""
    if torch.compiler.is_compiling() or not isinstance(classify, nn.Module):
        return []
    return [(id(buffer), buffer._version) for buffer in classify.buffers() if not buffer.is_inference()]


def _sums(own: Tensor, other: Tensor, targets: Targets, settings: Settings) -> tuple[Tensor, Tensor]:
    """The sums over the rows that count of the cross-entropy of both logits [N,C], and of the ranking."""
    (margin, _, smoothing, weight), (labels, valid, *_) = settings, targets

    def log_probabilities(logits: Tensor) -> Tensor:
        # Masked before, not only after: whatever an invalid row holds, infinity included, its gradient is zero.
        return logits.masked_fill(~valid[:, None], 0).to(_at_least_float32(logits.dtype)).log_softmax(1)

    def smoothed(rows: Tensor, at_label: Tensor) -> Tensor:
        """Cross-entropy of rows of log-probabilities, which at the label are at_label."""
        of_label = at_label if weight is None else at_label * weight[labels]
        if not smoothing:
            return -of_label
        of_all = rows.mean(1) if weight is None else (rows * weight).mean(1)
        return (smoothing - 1) * of_label - smoothing * of_all

    own_rows = log_probabilities(own)
    other_rows = own_rows if other is own else log_probabilities(other)
    own_label, other_label = (at(labels[:, None], rows).squeeze(1) for rows in (own_rows, other_rows))
    cross_entropy = smoothed(own_rows, own_label) + smoothed(other_rows, other_label)
    ranking = (other_label.exp() - own_label.exp() + margin).relu()
    return cross_entropy.where(valid, 0).sum(), ranking.where(valid, 0).sum()


def _mean(cross_entropy: Tensor, ranking: Tensor, targets: Targets, settings: Settings) -> LossTerms:
    cross_entropy, ranking = cross_entropy / (2 * targets.weight_sum), ranking / targets.num_rows
    return LossTerms(cross_entropy + settings.rank_weight * ranking, cross_entropy, ranking)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(output: "APIOutput") -> None:
    if not (isinstance(output, tuple) and hasattr(output, "num_rows")):
        raise TypeError(f"the loss is of an APIOutput, got {type(output).__name__}: call the head with labels")
    if output.unclassified:
        raise ValueError(
            f"the loss needs logits, and the head has no classifier: its output holds the features "
            f"{describe(output.logits_self)}; make the head with num_classes=, or call it with classifier="
        )
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
