"""Mutual vectors m [P,D] of the features [P,D] of pairs of images (paper, section 3.1, and its ablation)."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apinet_head._modules import is_plain, is_plain_linear


class MutualMLP(nn.Module):
    """m = fc2(drop(fc1([x_a, x_b]))), without an activation in between (equation 1, as published).

    Examples:
        >>> MutualMLP(dim=8, hidden_dim=4)(torch.zeros(3, 8), torch.zeros(3, 8)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, dim: int, hidden_dim: int = 512, dropout: float = 0.5, out_dim: int | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.fc1: nn.Linear = nn.Linear(2 * dim, hidden_dim, **factory)
        self.drop: nn.Dropout = nn.Dropout(dropout)
        self.fc2: nn.Linear = nn.Linear(hidden_dim, dim if out_dim is None else out_dim, **factory)

    def forward(self, anchor: Tensor, partner: Tensor) -> Tensor:
        mutual: Tensor = self.fc2(self.drop(self.fc1(torch.cat([anchor, partner], 1))))
        return mutual

    def of_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """`forward` of features[rows[0]] and features[rows[1]], for features [B,D], rows [2,P] and a plain `fc1`.

        [x_a, x_b] W = x_a W_left + x_b W_right: each image is projected once instead of once per pair.
        """
        weight, bias = self.fc1.weight, self.fc1.bias
        # A row of the weight is [W_left, W_right] of one hidden channel; viewed as two rows, one product computes both.
        projected = F.linear(features, weight.reshape(-1, features.shape[1]))
        left, right = projected.view(-1, weight.shape[0], 2).unbind(2)
        hidden = left.index_select(0, rows[0]) + right.index_select(0, rows[1])
        mutual: Tensor = self.fc2(self.drop(hidden if bias is None else hidden + bias))
        return mutual


def is_plain_mlp(mutual: nn.Module) -> TypeGuard[MutualMLP]:
    """Whether `MutualMLP.of_rows` is equivalent to calling the module."""
    return is_plain(mutual, MutualMLP) and is_plain_linear(mutual.fc1)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "individual": lambda anchor, partner: torch.ones_like(anchor),  # no mutual vector: g = sigmoid(x)
    "square_diff": lambda anchor, partner: (anchor - partner).square(),
    "sum": torch.add,
    "product": torch.mul,
}


class MutualFormula(nn.Module):
    """m as a function of x_a and x_b without parameters, one of FORMULAS."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, anchor: Tensor, partner: Tensor) -> Tensor:
        return FORMULAS[self.name](anchor, partner)

    def extra_repr(self) -> str:
        return repr(self.name)


class MutualWeighted(MutualMLP):
    """m = w_a x_a + w_b x_b, with weights from a softmax over the two outputs of an MLP on [x_a, x_b]."""

    def __init__(self, dim: int, hidden_dim: int = 512, dropout: float = 0.5, **factory: Any) -> None:
        super().__init__(dim, hidden_dim, dropout, out_dim=2, **factory)

    def forward(self, anchor: Tensor, partner: Tensor) -> Tensor:
        weights = super().forward(anchor, partner).softmax(1)
        return weights[:, :1] * anchor + weights[:, 1:] * partner


class MutualBilinear(nn.Module):
    """m = compact bilinear pooling of x_a and x_b: a count sketch of their outer product, in D numbers.

    It is the circular convolution of the count sketches of the two vectors, computed by FFT (Gao, Beijbom, Zhang,
    Darrell: "Compact Bilinear Pooling", CVPR 2016, algorithm 2). Hashes and signs come from a fixed seed and are stored
    as buffers.
    """

    slots: Tensor
    signs: Tensor

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        generator, device = torch.Generator("cpu").manual_seed(0), device or torch.empty(0).device
        slots = torch.randint(dim, (2, dim), generator=generator, device="cpu")
        signs = torch.randint(2, (2, dim), generator=generator, device="cpu") * 2 - 1
        self.register_buffer("slots", slots.to(device))
        self.register_buffer("signs", signs.to(device=device, dtype=dtype or torch.get_default_dtype()))

    def forward(self, anchor: Tensor, partner: Tensor) -> Tensor:
        if anchor.shape[0] == 0:  # not every FFT library supports an empty batch
            return anchor * partner
        # The FFT supports neither bfloat16 nor float16 of every length.
        dtype = torch.promote_types(anchor.dtype, torch.float32)
        spectra = [torch.fft.rfft(self._sketch(x.to(dtype), side)) for side, x in enumerate((anchor, partner))]
        mutual: Tensor = torch.fft.irfft(spectra[0] * spectra[1], n=anchor.shape[1])
        return mutual.to(anchor.dtype)

    def _sketch(self, x: Tensor, side: int) -> Tensor:
        return torch.zeros_like(x).index_add(1, self.slots[side], x * self.signs[side].to(x.dtype))


MUTUALS = ("mlp", "weighted", "bilinear", *FORMULAS)


def make_mutual(name: str, dim: int, hidden_dim: int, dropout: float, **factory: Any) -> nn.Module:
    """The module of that name; raises ValueError for an unknown one."""
    if not isinstance(name, str) or name not in MUTUALS:
        raise ValueError(f"mutual must be a module or one of {', '.join(map(repr, MUTUALS))}, got {name!r}")
    if name in ("mlp", "weighted"):
        return (MutualMLP if name == "mlp" else MutualWeighted)(dim, hidden_dim, dropout, **factory)
    return MutualBilinear(dim, **factory) if name == "bilinear" else MutualFormula(name)
