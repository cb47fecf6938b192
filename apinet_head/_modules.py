"""When the weights of a module may be read instead of calling it, and how a classifier is called."""

from collections.abc import Callable
from typing import TypeGuard, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as torch_module

from apinet_head._checks import describe

M = TypeVar("M", bound=nn.Module)


def is_plain(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether calling the module only runs the `forward` of this class: no subclass, no hooks."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_global_hooks()
    )


def _has_global_hooks() -> bool:
    """Whether there are hooks of all modules, by `register_module_forward_hook` and the like."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_plain_linear(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether calling the layer is just `F.linear` with its weight and bias, so that these may be read.

    False for an adapter or quantised layer in its place, a parametrisation, a hook (pruning and the older weight_norm
    are hooks), or a weight that is a DTensor or another subclass of Tensor.
    """
    return is_plain(layer, nn.Linear) and all(
        type(weight) in (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
        for weight in (layer.weight, layer.bias)
        if weight is not None
    )


def classify_groups(features: Tensor, classify: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [G,N,C] of features [G,N,D], in one call of a classifier that maps [N,D] to [N,C]."""
    rows = features.flatten(0, 1)
    logits = classify(rows)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != rows.shape[0]:
        raise ValueError(f"the classifier must map [N, D] to [N, C], got {describe(logits)} for N={rows.shape[0]}")
    return logits.view(*features.shape[:2], logits.shape[1])
