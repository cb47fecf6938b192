"""A head with images for it, of any settings."""

import torch

from apinet_head import APIHead


def make_case(size=12, dim=9, classes=5, seed=0, dtype=torch.float64, **head_args):
    """A head without dropout, features [size,dim] that learn, and labels [size] of all classes."""
    torch.manual_seed(seed)
    head = APIHead(dim, classes, **{"hidden_dim": 6, "dropout": 0.0, "dtype": dtype, **head_args})
    return head, torch.randn(size, dim, dtype=dtype, requires_grad=True), torch.arange(size) % classes
