"""`Dropout`, against what dropout is, and what the head keeps for its backward pass."""

import pytest
import torch
from footprint import saved_bytes
from torch import nn

from apinet_head import APIHead, api_loss, mine_pairs
from apinet_head.dropout import Dropout


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_keeps_its_share_and_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.full((300, 1000), 3.0, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    assert y.dtype == dtype
    scale = 1 / (1 - p) if p < 1 else 0.0
    for value in (y.detach() / 3, x.grad):
        torch.testing.assert_close(value.unique().double(), torch.tensor([0.0, scale]).double().unique()
                                   if 0 < p < 1 else torch.tensor([scale]).double(), rtol=1e-2, atol=0)  # fmt: skip
    share = (y != 0).double().mean()
    assert abs(share - (1 - p)) <= 5 * (p * (1 - p) / y.numel()) ** 0.5  # five standard deviations
    assert torch.equal(y.detach() / 3 != 0, x.grad != 0)


def test_eval_mode_changes_nothing_and_seeds_repeat():
    x = torch.randn(20, 30)
    assert Dropout(0.5).eval()(x) is x
    drop = Dropout(0.5)
    first, second = [torch.manual_seed(seed) and drop(x) for seed in (1, 1)]
    assert torch.equal(first, second)
    assert not torch.equal(first, drop(x))
    assert isinstance(drop, nn.Dropout)


def test_compiled():
    torch._dynamo.reset()
    y = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")(torch.ones(100, 100))
    assert y.unique().tolist() == [0.0, 2.0]


def test_the_head_keeps_six_numbers_a_channel_of_each_pair():
    # The mutual vector, the four gated features as the classifier takes them, and their masks, a byte each. What the
    # published head keeps is fifteen: benchmarks/head.py compares.
    size, dim, classes = 40, 1024, 8
    head = APIHead(dim, classes, hidden_dim=32)
    features, labels = torch.randn(size, dim, requires_grad=True), torch.arange(size) // 4
    pairs = mine_pairs(features, labels)
    found, loss = saved_bytes(
        lambda: api_loss(head(features, labels % classes, pairs=pairs)), [features, *head.parameters()]
    )
    assert found <= 1.1 * 6 * 2 * size * dim * 4
    loss.backward()
