"""Argument checks that read shapes, dtypes and devices, never values, and so do not synchronise."""

import math
import reprlib
from numbers import Integral, Real

import torch
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """A tensor as `float32 [30, 2048] on cpu`, anything else by its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"


def check_tensor(tensor: Tensor, name: str, shape: str, advice: str = "") -> None:
    """Raise unless this is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(tensor).__name__}{advice}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}, {describe(tensor)}")


def check_features(features: Tensor, name: str = "features", dim: int | None = None) -> None:
    """Raise unless `features` is a floating point [B,D], with D = dim if given."""
    check_tensor(features, name, "[B, D]", ": take the pooled features of it")
    if features.ndim != 2:
        advice = {
            3: ": pool it first, for example x.mean(1); or give a BalancedBatchSampler as batch_sampler=, not sampler=",
            4: ": pool it first, for example x.mean((2, 3))",
        }.get(features.ndim, "")
        raise ValueError(f"{name} must be [B, D], got {describe(features)}{advice}")
    if features.dtype not in FLOATS:  # such as float8, which does not support addition
        raise ValueError(
            f"{name} must be of a floating point dtype, float16, bfloat16, float32 or float64, got {describe(features)}"
        )
    if features.shape[1] == 0:
        raise ValueError(f"{name} must have at least one channel, got {describe(features)}")
    if dim is not None and features.shape[1] != dim:
        raise ValueError(
            f"{name} must be [B, {dim}], got {describe(features)}: set dim={features.shape[1]}, or check that the "
            "backbone gives pooled features (timm: num_classes=0)"
        )


def check_labels(labels: Tensor, features: Tensor, name: str = "labels", features_name: str = "features") -> None:
    """Raise unless `labels` is an integer [B] on the device of `features` [B,D]."""
    check_integer(labels, name)
    if labels.shape[0] != features.shape[0]:
        raise ValueError(
            f"{name} must have one entry per row of {features_name}: got {describe(labels)} for {describe(features)}"
        )
    check_device(labels, name, features, features_name)


def check_integer(labels: Tensor, name: str = "labels") -> None:
    """Raise unless `labels` is an integer vector."""
    check_tensor(labels, name, "[B]", f": use torch.tensor({name})")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be class indices of an integer dtype, got {describe(labels)}")
    if labels.ndim != 1:
        advice = ": use labels.squeeze(1)" if labels.ndim == 2 and labels.shape[1] == 1 else ""
        raise ValueError(f"{name} must be [B], got {describe(labels)}{advice}")


def check_valid(valid: Tensor, rows: Tensor, name: str) -> None:
    """Raise unless `valid` is a bool [N] on the device of rows [N,...]."""
    check_tensor(valid, name, f"[{rows.shape[0]}]")
    if valid.dtype != torch.bool or valid.shape != rows.shape[:1]:
        raise ValueError(f"{name} must be bool [{rows.shape[0]}], got {describe(valid)}")
    check_device(valid, name, rows, "its rows")


def check_device(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raise ValueError if the two tensors are on different devices."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {describe(tensor)} and {describe(other)}: "
            f"move one with .to({str(other.device)!r})"
        )


def check_generator(generator: torch.Generator | None, tensor: Tensor, owner: str) -> None:
    """Raise unless `generator` is None or on the device of `tensor`."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != tensor.device.type:
        raise ValueError(f"generator must be on the {owner} device {tensor.device}, got {generator.device}")


def check_module(module: nn.Module, name: str) -> None:
    """Raise TypeError unless `module` is a module."""
    if not isinstance(module, nn.Module):
        advice = f": nn.Sequential(*{name}) makes one of them" if isinstance(module, (list, tuple)) else ""
        raise TypeError(f"{name} must be a module, got {type(module).__name__}{advice}")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise ValueError unless `dtype` is None or a floating point dtype."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be float16, bfloat16, float32, float64 or None, got {dtype!r}")


def check_int(value: int, name: str, least: int | None = None, most: int | None = None) -> int:
    """The value as a Python int (or SymInt); raises unless it is an integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if (least is not None and value < least) or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)


def check_number(value: float, name: str, least: float = -math.inf, most: float = math.inf) -> float:
    """The value as a Python float (or SymFloat); raises unless it is a finite number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not (-math.inf < value < math.inf and least <= value <= most):  # math.isfinite takes no SymFloat
        bounds = f"in [{least}, {most}{']' if math.isfinite(most) else ')'}" if math.isfinite(least) else "finite"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value if isinstance(value, torch.SymFloat) else float(value)


def shown(value: object) -> str:
    """A wrong argument in an error message."""
    return describe(value) if isinstance(value, Tensor) else reprlib.repr(value)
