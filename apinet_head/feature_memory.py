"""A memory of past batches (Wang, Zhang, Huang, Scott: "Cross-Batch Memory for Embedding Learning", CVPR 2020)."""

import math

import torch
from torch import Tensor, nn

from apinet_head._checks import check_device, check_dtype, check_features, check_int, check_labels


class FeatureMemory(nn.Module):
    """The last `size` features and labels of past batches, as `keys` for `mine_pairs` and `APIHead`.

    A ring buffer on the device: row n, counted from the first one ever pushed, is stored in slot n % size. Shapes are
    fixed, nothing synchronises, features are detached, and the state dict holds everything. Empty slots hold NaN and
    are never partners. `APIHead(memory=N)` creates one, and pushes and searches by itself.

    The features are those of past weights, so start after a warm-up: `head.memory = FeatureMemory(N, D)`. An image may
    be paired with its own past feature, so size should be well below an epoch.

    Args:
        size: M, number of features to keep.
        dim: channels D of the features.
        device: of the memory.
        dtype: to which features are converted.

    Attributes:
        features: [M,D], NaN in empty slots.
        labels: [M] int64, -1 in empty slots.
        num_pushed: 0-d int64, number of rows ever pushed.

    Raises:
        ValueError: size or dim is below 1, or dtype is not floating point.
        TypeError: size or dim is not an int.

    Examples:
        >>> from apinet_head import mine_pairs
        >>> memory = FeatureMemory(size=64, dim=16)
        >>> memory.push(torch.randn(4, 16), torch.tensor([0, 1, 2, 3]))
        >>> keys = {"keys": memory.features, "key_labels": memory.labels}
        >>> mine_pairs(torch.randn(2, 16), torch.tensor([3, 4]), inter=None, **keys).partner.tolist()
        [3, 0]
    """

    features: Tensor
    labels: Tensor
    num_pushed: Tensor

    def __init__(
        self, size: int, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.size: int = check_int(size, "size", 1)
        self.dim: int = check_int(dim, "dim", 1)
        check_dtype(dtype)
        self.register_buffer("features", torch.full((self.size, self.dim), math.nan, device=device, dtype=dtype))
        self.register_buffer("labels", torch.full((self.size,), -1, device=device, dtype=torch.int64))
        self.register_buffer("num_pushed", torch.zeros((), device=device, dtype=torch.int64))

    @property
    def filled(self) -> Tensor:
        """Number of slots in use, 0-d int64 on the device; these are `features[:filled]`."""
        return self.num_pushed.clamp(max=self.size)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Store features [B,D] and labels [B] over the oldest rows; of more than `size` rows, the last ones.

        Raises:
            ValueError: shapes, dtypes or devices do not match; the message shows what was passed.
        """
        check_features(features, dim=self.dim)
        check_labels(labels, features)
        check_device(features, "features", self.features, "the memory")
        self.push_unchecked(features, labels)

    def push_unchecked(self, features: Tensor, labels: Tensor) -> None:
        """`push` without the argument checks."""
        pushed = features.shape[0]
        features, labels = features.detach()[-self.size :], labels[-self.size :]
        # Only the last `size` rows: with a slot written twice, the result of the copy would not be defined.
        kept = torch.arange(pushed - features.shape[0], pushed, device=features.device)
        slots = (self.num_pushed + kept) % self.size
        self.features.index_copy_(0, slots, features.to(self.features.dtype))
        self.labels.index_copy_(0, slots, labels.to(self.labels.dtype))
        self.num_pushed.add_(pushed)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"
