"""The loss of a linear classifier, some rows of logits at a time, as in fused linear cross-entropy.

Gradients are computed in the forward pass, while a part of the logits exists, and the weight's is accumulated in one
buffer; the backward pass only scales (Liger-Kernel, arXiv 2410.10989; cut cross-entropy, arXiv 2411.09009). With z the
logits of a row, p their softmax, y the label, w the class weights and s the label smoothing:

    d cross_entropy / d z_k = p_k ((1-s) w_y + s/C sum(w)) - [k=y] (1-s) w_y - s/C w_k
    d p_y / d z_k = p_y ([k=y] - p_k),  in the ranking term where p_other_y - p_self_y + margin > 0
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Until the backward pass, gradients are scaled by _LIFT * num_rows: those of unlikely classes, about 1/C, would
# underflow in float16.
_LIFT = 16
_BLOCK = 4096  # classes at a time when adding a product to a buffer of another dtype


class Settings(NamedTuple):
    """See `api_loss_terms`."""

    margin: float
    rank_weight: float
    label_smoothing: float


class Targets(NamedTuple):
    """Labels [N] in [0,C), valid [N], class weights [C], and the divisors of sums over rows: infinity for no rows."""

    labels: Tensor
    valid: Tensor
    class_weight: Tensor | None
    num_rows: Tensor
    weight_sum: Tensor

    def of_part(self, labels: Tensor, valid: Tensor) -> "Targets":
        """The same for some of the rows."""
        return Targets(labels, valid, self.class_weight, self.num_rows, self.weight_sum)


def linear_loss(
    gated: Tensor, classifier: nn.Linear, targets: Targets, settings: Settings, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, cross-entropy and ranking of gated features [G,N,D], with logits [G,rows,C] at a time.

    Only the total has a gradient.
    """
    weight, bias, dtype = classifier.weight, classifier.bias, gated.dtype
    if torch.is_autocast_enabled(gated.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(gated.device.type)
    learns = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (gated, weight, bias)]
    terms: tuple[Tensor, Tensor, Tensor] = _LinearLoss.apply(
        gated, weight, bias, targets, settings, rows, dtype, learns
    )
    return terms


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gated: Tensor, weight: Tensor, bias: Tensor | None,
        targets: Targets, settings: Settings, rows: int, dtype: torch.dtype, learns: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        of_gated, of_weight, of_bias = (
            torch.zeros_like(t) if t is not None and on else None
            for t, on in zip((gated, weight, bias), learns, strict=True)
        )
        groups, size, dim = gated.shape
        sums = gated.new_zeros(2, dtype=torch.promote_types(dtype, torch.float32))
        with torch.autocast(gated.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for first in range(0, size, rows):
                part = slice(first, first + rows)
                x = gated[:, part].flatten(0, 1).to(dtype)
                logits = F.linear(x, w, b).to(sums.dtype)
                of_part = targets.of_part(targets.labels[part], targets.valid[part])
                sums += _to_gradient(logits.view(groups, -1, logits.shape[1]), of_part, settings)
                gradient = logits.to(dtype)
                if of_gated is not None:
                    of_gated[:, part] = (gradient @ w).view(groups, -1, dim)
                if of_weight is not None:
                    _add_product(of_weight, gradient.T, x)
                if of_bias is not None:
                    of_bias += logits.sum(0)
        cross_entropy, ranking = sums[0] / (groups * targets.weight_sum), sums[1] / targets.num_rows
        ctx.is_used = False
        ctx.save_for_backward(targets.num_rows, of_gated, of_weight, of_bias)
        ctx.mark_non_differentiable(cross_entropy, ranking)
        return cross_entropy + settings.rank_weight * ranking, cross_entropy, ranking

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
        # In place, as a second buffer of the weight's size would be half of the step's memory.
        return *(None if kept is None else kept.mul_(scale) for kept in gradients), *[None] * 5


def _to_gradient(logits: Tensor, targets: Targets, settings: Settings) -> Tensor:
    """Sums [2] of the losses of logits [G,n,C], which are overwritten by their gradient to save memory."""
    (margin, rank_weight, smoothing), (labels, valid, class_weight, num_rows, weight_sum) = settings, targets
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
    """buffer += a @ b without a temporary of that size."""
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
