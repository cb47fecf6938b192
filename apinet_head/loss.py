"""The loss: cross-entropy of all gated features, and a ranking of own gate above other gate (paper, section 3.2)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apinet_head._checks import (
    FLOATS,
    check_device,
    check_features,
    check_int,
    check_labels,
    check_number,
    check_valid,
    describe,
    shown,
)
from apinet_head._linear_loss import Settings, Targets, at, linear_loss
from apinet_head._modules import classify_groups, is_plain_linear
from apinet_head.distributed import mean_over_ranks, world_size

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
    """The scalar to minimise, `api_loss_terms(...).total`.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> api_loss(output).backward()
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

    With p the softmax of a row's logits at its label:

        cross_entropy = mean of -log p over all 4P rows
        ranking = mean of max(0, p_other - p_self + margin) over the 2P rows

    Rows that are not valid or whose label is negative are masked out; with no row left, the loss is 0 with zero
    gradients. Computed in float32 at least, under autocast too. With gather, the mean of the ranks' losses is the loss
    of the whole batch; with class weights, all ranks of the group must then call the loss, which reduces the sum of the
    weights over them.

    Args:
        output: of an APIHead with a classifier, logits [2P,C]; labels of valid rows in [0,C).
        margin: by how much the probability under the own gate should exceed that under the other's.
        rank_weight: weight of the ranking term (lambda in the paper).
        label_smoothing: as in F.cross_entropy; not in the ranking term.
        class_weight: [C], as `weight` in F.cross_entropy; not in the ranking term. It gets no gradient.

    Raises:
        ValueError: the head has no classifier; shapes or dtypes do not match; a label is not below C (checked on a CPU
            only); or a setting is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> from apinet_head import APIHead
        >>> output = APIHead(dim=16, num_classes=5)(torch.randn(4, 16), torch.tensor([0, 0, 1, 1]))
        >>> terms = api_loss_terms(output, rank_weight=0.5)
        >>> bool(torch.isclose(terms.total, terms.cross_entropy + 0.5 * terms.ranking))
        True
    """
    _check(output)
    settings = _settings(margin, rank_weight, label_smoothing, class_weight)
    own, other, labels, valid, _, num_rows, group, _ = output
    return _of_logits(own, other, labels, valid, num_rows, group, class_weight, settings)


class APILoss(nn.Module):
    """`api_loss` as a module, which can also be passed to a head as `criterion=`.

    With many classes, the logits of all rows [4P,C] take most of a step's memory. With `criterion=APILoss(rows=64)`, 64
    rows of them exist at a time. If the classifier is a plain nn.Linear, gradients are computed in the forward pass and
    the weight's is accumulated in one buffer; then only `total` has a gradient, for a single backward pass. Any other
    classifier must treat each row independently: its parts are recomputed in the backward pass. Under the transforms of
    torch.func, `rows` is ignored.

    Args:
        margin: as the next three, see `api_loss_terms`. `class_weight` is a buffer.
        rows: number of rows of logits that exist at a time, at least 2, as a row under its own gate and under the
            other's go together; None for all.

    Raises:
        ValueError: a number is out of range, or class_weight is not [C].
        TypeError: an argument has the wrong type.

    Examples:
        >>> from apinet_head import APIHead
        >>> features, labels = torch.randn(4, 16), torch.tensor([0, 0, 1, 1])
        >>> loss = APILoss(class_weight=torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]), rows=8)
        >>> APIHead(dim=16, num_classes=5)(features, labels, criterion=loss).total.backward()
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
        settings = _settings(margin, rank_weight, label_smoothing, class_weight)
        self.margin, self.rank_weight, self.label_smoothing = settings
        self.register_buffer("class_weight", class_weight)
        self.rows = None if rows is None else check_int(rows, "rows", 1)

    def forward(self, output: "APIOutput") -> Tensor:
        """The scalar to minimise."""
        return self.terms(output).total

    def terms(self, output: "APIOutput") -> LossTerms:
        """The loss and its two terms, see `api_loss_terms`."""
        return api_loss_terms(output, **self.settings._asdict(), class_weight=self.class_weight)

    def of_features(
        self, gated: Tensor, labels: Tensor, valid: Tensor, num_rows: Tensor | None,
        classify: Callable[[Tensor], Tensor], group: str | None = None,
    ) -> LossTerms:  # fmt: skip
        """The loss of gated features [G,2P,D] and a classifier from [N,D] to logits [N,C].

        G is 2, own gate and other gate, or 1 if these are the same.
        """
        if self.rows is None or torch._C._are_functorch_transforms_active():
            logits = classify_groups(gated, classify).unbind()
            return _of_logits(logits[0], logits[-1], labels, valid, num_rows, group, self.class_weight, self.settings)
        rows = max(1, self.rows // gated.shape[0])
        if isinstance(classify, nn.Linear) and is_plain_linear(classify):
            _check_class_weight(self.class_weight, classify.out_features)
            targets = _targets(labels, valid, num_rows, group, self.class_weight, gated)
            return LossTerms(*linear_loss(gated, classify, targets, self.settings, rows))
        targets = _targets(labels, valid, num_rows, group, self.class_weight, gated)

        def sums_of(gated: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
            logits = classify_groups(gated, classify).unbind()
            _check_class_weight(self.class_weight, logits[0].shape[1])
            part = targets.of_part(labels, valid)
            return torch.stack(_sums(logits[0], logits[-1], part, self.settings))

        before, sums = _versions(classify), gated.new_zeros(2, dtype=_at_least_float32(gated.dtype))
        parts = [torch.split(gated, rows, 1), torch.split(targets.labels, rows), torch.split(targets.valid, rows)]
        for part in zip(*parts, strict=True):
            sums = sums + checkpoint(sums_of, *part, use_reentrant=False)
        if torch.is_grad_enabled() and _versions(classify) != before:
            raise ValueError(
                f"rows= runs the classifier in parts, and again in the backward pass, and {type(classify).__name__} "
                "changes its buffers each time (in train mode BatchNorm and spectral_norm do): use APILoss(rows=None)"
            )
        return _mean(sums[0], sums[1], targets, self.settings)

    @property
    def settings(self) -> Settings:
        return Settings(self.margin, self.rank_weight, self.label_smoothing)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in (*Settings._fields, "rows"))


def _settings(margin: float, rank_weight: float, label_smoothing: float, class_weight: Tensor | None) -> Settings:
    if class_weight is not None and not isinstance(class_weight, Tensor):
        raise TypeError(f"class_weight must be a tensor [C] or None, got {shown(class_weight)}: use torch.tensor()")
    if class_weight is not None and (class_weight.ndim != 1 or class_weight.dtype not in FLOATS):
        raise ValueError(f"class_weight must be [C] of a floating point dtype, got {describe(class_weight)}")
    return Settings(
        check_number(margin, "margin"),
        check_number(rank_weight, "rank_weight"),
        check_number(label_smoothing, "label_smoothing", 0, 1),
    )


def _check_class_weight(class_weight: Tensor | None, classes: int) -> None:
    if class_weight is not None and class_weight.shape[0] != classes:
        raise ValueError(f"class_weight must be [{classes}], a weight per class, got {describe(class_weight)}")


def _of_logits(
    own: Tensor, other: Tensor, labels: Tensor, valid: Tensor, num_rows: Tensor | None, group: str | None,
    class_weight: Tensor | None, settings: Settings,
) -> LossTerms:  # fmt: skip
    _check_class_weight(class_weight, own.shape[1])
    targets = _targets(labels, valid, num_rows, group, class_weight, own)
    return _mean(*_sums(own, other, targets, settings), targets, settings)


def _targets(
    labels: Tensor, valid: Tensor, num_rows: Tensor | None, group: str | None,
    class_weight: Tensor | None, rows: Tensor,
) -> Targets:  # fmt: skip
    """The targets of rows of logits, or of the features that logits are computed from."""
    dtype = _at_least_float32(rows.dtype)
    labels = labels.long()  # few other dtypes support comparison
    valid = valid & (labels >= 0)
    labels = labels.where(valid, 0)
    divisor = _divisor(valid.sum() if num_rows is None else num_rows, dtype)
    if class_weight is None:
        return Targets(labels, valid, None, divisor, divisor)
    check_device(class_weight, "class_weight", rows, "the logits")
    class_weight = class_weight.detach().to(dtype)
    weights = at(labels[:, None], class_weight.expand(len(labels), -1))
    weight_sum = weights.where(valid[:, None], 0).sum()
    if num_rows is not None and world_size(group) > 1:
        weight_sum = mean_over_ranks(weight_sum, group)
    return Targets(labels, valid, class_weight, divisor, _divisor(weight_sum, dtype))


def _divisor(count: Tensor, dtype: torch.dtype) -> Tensor:
    """The divisor of a sum over `count` rows: infinity for no rows, so that loss and gradient are 0."""
    return count.to(dtype).masked_fill(count == 0, torch.inf)


def _versions(classify: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """A value that differs once a buffer of the classifier is modified or replaced."""
    if torch.compiler.is_compiling() or not isinstance(classify, nn.Module):
        return []
    return [(id(buffer), buffer._version) for buffer in classify.buffers() if not buffer.is_inference()]


def _sums(own: Tensor, other: Tensor, targets: Targets, settings: Settings) -> tuple[Tensor, Tensor]:
    """Sums over the valid rows: of the cross-entropy of both logits [N,C] and of the ranking term."""
    (margin, _, smoothing), (labels, valid, weight, *_) = settings, targets

    def log_probabilities(logits: Tensor) -> Tensor:
        # Masked before the softmax too: the gradient of an invalid row is zero even if it holds infinity.
        return logits.masked_fill(~valid[:, None], 0).to(_at_least_float32(logits.dtype)).log_softmax(1)

    def cross_entropy(log_p: Tensor, at_label: Tensor) -> Tensor:
        of_label = at_label if weight is None else at_label * weight[labels]
        if not smoothing:
            return -of_label
        of_all = log_p.mean(1) if weight is None else (log_p * weight).mean(1)
        return (smoothing - 1) * of_label - smoothing * of_all

    own_log_p = log_probabilities(own)
    other_log_p = own_log_p if other is own else log_probabilities(other)
    own_label, other_label = (at(labels[:, None], log_p).squeeze(1) for log_p in (own_log_p, other_log_p))
    of_both = cross_entropy(own_log_p, own_label) + cross_entropy(other_log_p, other_label)
    ranking = (other_label.exp() - own_label.exp() + margin).relu()
    return of_both.where(valid, 0).sum(), ranking.where(valid, 0).sum()


def _mean(cross_entropy: Tensor, ranking: Tensor, targets: Targets, settings: Settings) -> LossTerms:
    cross_entropy, ranking = cross_entropy / (2 * targets.weight_sum), ranking / targets.num_rows
    return LossTerms(cross_entropy + settings.rank_weight * ranking, cross_entropy, ranking)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(output: "APIOutput") -> None:
    if not (isinstance(output, tuple) and hasattr(output, "num_rows")):
        raise TypeError(f"the loss needs an APIOutput, got {type(output).__name__}: call the head with labels")
    own, other, labels, valid, _, num_rows, *_ = output
    if output.unclassified:
        raise ValueError(
            f"the loss needs logits, and a head with no classifier returned the features {describe(own)}: create it "
            "with num_classes=, or call it with classifier="
        )
    check_features(own, "logits_self")
    check_features(other, "logits_other")
    if own.shape != other.shape:
        raise ValueError(f"logits must be two [2P, C], got {describe(own)} and {describe(other)}")
    check_device(other, "logits_other", own, "logits_self")
    check_labels(labels, own, features_name="the logits")
    check_valid(valid, labels, "valid")
    if num_rows is not None and not (isinstance(num_rows, Tensor) and num_rows.ndim == 0):
        raise ValueError(f"num_rows must be a scalar tensor or None, got {describe(num_rows)}")
