"""The loss of a linear classifier, some rows of logits at a time, as in fused linear cross-entropy.

Gradients are made in the forward pass, while the logits of a part exist; the weight's is summed up in one buffer, and
the backward pass only scales (Liger-Kernel, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009). With z the logits
of a row, p their softmax, y the label, w the class weights and s the label smoothing:

    d cross_entropy / d z_k = p_k ((1-s) w_y + s/C sum(w)) - [k=y] (1-s) w_y - s/C w_k
    d p_y / d z_k = p_y ([k=y] - p_k),  which the ranking takes where p_other_y - p_self_y + margin > 0
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Until the backward pass, gradients are this many times num_rows too large: in float16 those of unlikely classes, about
# 1/C, would vanish otherwise.
_LIFT = 16
_BLOCK = 4096  # classes at a time, where a product is added to a buffer of another dtype


class Settings(NamedTuple):
    """What a loss is told when it is made, see `api_loss_terms`."""

    margin: float
    rank_weight: float
    label_smoothing: float
    class_weight: Tensor | None


class Targets(NamedTuple):
    """Labels [N] in [0,C), valid [N], and what sums over rows are divided by: infinity where no row counts."""

    labels: Tensor
    valid: Tensor
    num_rows: Tensor
    weight_sum: Tensor


def linear_loss(
    features: tuple[Tensor, ...], classifier: nn.Linear, targets: Targets, settings: Settings, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, cross-entropy and ranking of features [N,D], own and other, or one that is both.

    Only the total has a gradient. Logits exist of `rows` rows of each of the features at a time.
    """
    weight, bias, device, dtype = classifier.weight, classifier.bias, features[0].device.type, features[0].dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    learns = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (weight, bias, *features)]
    found: tuple[Tensor, Tensor, Tensor] = _LinearLoss.apply(
        weight, bias, *targets, *settings, rows, dtype, learns, *features
    )
    return found


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: Tensor,
        num_rows: Tensor, weight_sum: Tensor, margin: float, rank_weight: float, label_smoothing: float,
        class_weight: Tensor | None, rows: int, dtype: torch.dtype, learns: Sequence[bool],
        *features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        settings = Settings(margin, rank_weight, label_smoothing, class_weight)
        tensors = (weight, bias, *features)
        gradients = [
            torch.zeros_like(t) if t is not None and on else None for t, on in zip(tensors, learns, strict=True)
        ]
        sums = torch.zeros(2, dtype=torch.promote_types(dtype, torch.float32), device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            linear = weight.to(dtype), None if bias is None else bias.to(dtype)
            for first in range(0, len(labels), rows):
                part = slice(first, first + rows)
                targets = Targets(labels[part], valid[part], num_rows, weight_sum)
                x = torch.stack([tensor[part].to(dtype) for tensor in features])
                of_part = [None if gradient is None else gradient[part] for gradient in gradients[2:]]
                sums += _add_part(x, *linear, targets, settings, gradients[0], gradients[1], of_part)
        cross_entropy, ranking = sums[0] / (len(features) * weight_sum), sums[1] / num_rows
        ctx.is_used = False
        ctx.save_for_backward(num_rows, *gradients)
        ctx.mark_non_differentiable(cross_entropy, ranking)
        return cross_entropy + rank_weight * ranking, cross_entropy, ranking

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.compiler.is_compiling():
            if ctx.is_used or torch.is_grad_enabled():  # which create_graph=True does
                raise RuntimeError(
                    "a loss with rows= has a gradient for one backward pass: with retain_graph or create_graph "
                    "use APILoss(rows=None)"
                )
            ctx.is_used = True
        num_rows, *gradients = ctx.saved_tensors
        scale = gradient / (_LIFT * num_rows)
        # In place, for there is to be one buffer.
        of_weight, of_bias, *of_features = (None if kept is None else kept.mul_(scale) for kept in gradients)
        return of_weight, of_bias, *[None] * 11, *of_features


def _add_part(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, settings: Settings,
    of_weight: Tensor | None, of_bias: Tensor | None, of_features: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """Sums [2] of cross-entropy and ranking over a part of the rows, whose gradients are added to those of all."""
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sums = _to_gradient(logits, targets, settings)
    gradient = logits.to(x.dtype).flatten(0, 1)
    if any(rows is not None for rows in of_features):
        for rows, found in zip(of_features, (gradient @ weight).view_as(x), strict=True):
            if rows is not None:
                rows.copy_(found)
    if of_weight is not None:
        _add_product(of_weight, gradient.T, x.flatten(0, 1))
    if of_bias is not None:
        of_bias += logits.sum((0, 1))
    return sums


def _to_gradient(logits: Tensor, targets: Targets, settings: Settings) -> Tensor:
    """Sums [2] of the losses of logits [G,n,C], which become their own gradient: one buffer serves all."""
    (margin, rank_weight, smoothing, class_weight), (labels, valid, num_rows, weight_sum) = settings, targets
    w = logits.new_ones(logits.shape[2]) if class_weight is None else class_weight
    at_label, counts = labels.expand(len(logits), -1)[..., None], valid[:, None]
    logits.masked_fill_(~counts, 0)
    logits -= logits.amax(2, keepdim=True)
    log_p = at(at_label, logits)
    of_all = (logits @ w)[..., None] if smoothing else 0.0
    norm = logits.exp_().sum(2, keepdim=True)
    log_p -= norm.log()
    p = log_p.exp()

    share = smoothing / logits.shape[2]  # of each class in the target
    on_label, on_all = (1 - smoothing) * w[labels][:, None], share * w.sum()
    cross_entropy = on_all * norm.log() - share * of_all - on_label * log_p
    shortfall = p[-1] - p[0] + margin
    sums = torch.stack([cross_entropy.where(counts, 0).sum(), shortfall.relu().where(counts, 0).sum()])

    scale = _LIFT * num_rows / (len(logits) * weight_sum)
    pull = _LIFT * rank_weight * p.where(~(shortfall <= 0), 0)
    pull = torch.stack([pull[0], -pull[1]]) if len(logits) == 2 else torch.zeros_like(pull)
    logits *= ((on_label + on_all) * scale + pull).where(counts, 0) / norm
    logits.scatter_add_(2, at_label, -(on_label * scale + pull).where(counts, 0))
    if smoothing:
        logits.addcmul_((share * scale).where(counts, 0), w, value=-1)
    return sums


def _add_product(buffer: Tensor, a: Tensor, b: Tensor) -> None:
    """buffer += a @ b, without a second matrix of that size."""
    if buffer.dtype == a.dtype:
        buffer.addmm_(a, b)
        return
    for rows, factor in zip(torch.split(buffer, _BLOCK), torch.split(a, _BLOCK), strict=True):
        rows += factor @ b


def at(labels: Tensor, rows: Tensor) -> Tensor:
    """rows[..., labels] of rows [...,C], for labels [...,1] that must be in [0,C)."""
    try:
        return rows.gather(-1, labels)
    except RuntimeError as error:
        outside = (labels < 0) | (labels >= rows.shape[-1])
        if rows.device.type != "cpu" or not outside.any():  # then it is another error
            raise
        raise ValueError(
            f"labels of valid rows must be in [0, {rows.shape[-1]}) for {rows.shape[-1]} classes, got "
            f"{labels[outside].tolist()[0]}"
        ) from error
