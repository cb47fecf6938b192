"""A memory of past batches to search for partners in.

Wang, Zhang, Huang, Scott: "Cross-Batch Memory for Embedding Learning", CVPR 2020.
"""

import math

import torch
from torch import Tensor, nn

from apinet_head._checks import check_device, check_dtype, check_features, check_int, check_labels


class FeatureMemory(nn.Module):
    """The last `size` features and labels of past batches, as `keys` for `mine_pairs` and `APIHead`.

    A ring buffer on the device: the n-th row ever pushed, counted from 0, overwrites slot n % size. Shapes are fixed,
    nothing synchronises, and the state dict holds all of it. Features are detached. Empty slots hold NaN, which is
    never chosen as a partner: while the memory fills, a pair that finds no partner is not valid. `APIHead(memory=N)`
    keeps one of these, and pushes and searches by itself.

    The features are those of past weights: the more the net has changed since, the less they say, and the oldest are
    size / B steps old. So the paper starts the memory only after a warm-up of the net: until something is pushed,
    nothing is found. An image that comes again while it is remembered may be paired with its own past feature, so
    size should be well below an epoch.

    Args:
        size: M, how many features to keep.
        dim: channels D of the features.
        device: of the memory.
        dtype: of the kept features, into which others are converted.

    Attributes:
        features: [M,D], NaN where nothing was pushed yet.
        labels: [M] int64, -1 there.
        num_pushed: 0-d int64, how many rows were ever pushed.

    Raises:
        ValueError: size or dim is below 1, or dtype not one of features.
        TypeError: size or dim is no int.

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
        """How many slots are in use, 0-d int64 on the device: they are the first ones, `features[:filled]`."""
        return self.num_pushed.clamp(max=self.size)

    def push(self, features: Tensor, labels: Tensor) -> None:
        """Keep a batch, over the oldest rows; of one larger than the memory, its last `size` rows.

        Args:
            features: [B,D], of any floating point dtype.
            labels: [B], class indices of any integer dtype.

        Raises:
            ValueError: shapes, dtypes or devices don't fit; the message shows what came.
        """
        check_features(features, dim=self.dim)
        check_labels(labels, features)
        check_device(features, "features", self.features, "the memory")
        self.push_unchecked(features, labels)

    def push_unchecked(self, features: Tensor, labels: Tensor) -> None:
        """`push` of what was checked before."""
        pushed = features.shape[0]
        features, labels = features.detach()[-self.size :], labels[-self.size :]
        # No slot comes twice among them, so that the copy has one possible result.
        kept = torch.arange(pushed - features.shape[0], pushed, device=features.device)
        slots = (self.num_pushed + kept) % self.size
        self.features.index_copy_(0, slots, features.to(self.features.dtype))
        self.labels.index_copy_(0, slots, labels.to(self.labels.dtype))
        self.num_pushed.add_(pushed)

    def extra_repr(self) -> str:
        return f"size={self.size}, dim={self.dim}"
