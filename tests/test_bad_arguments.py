"""What doesn't fit is an error that shows it, and what isn't finite shows in the loss."""

import pytest
import torch

from apinet_head import APIHead, FeatureMemory, Pairs, api_loss, mine_pairs

X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])


def head(**arguments):
    return APIHead(8, 3, hidden_dim=4, **arguments)


def pairs(**fields):
    return mine_pairs(X, Y)._replace(**fields)


def test_features_that_are_all_nan_give_a_loss_that_is():
    # No pair is left; a loss of 0 would hide gradients that aren't finite.
    assert api_loss(head()(torch.full_like(X, torch.nan), Y)).isnan()
    assert api_loss(head()(torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.long))).isnan()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_give_the_same_loss(dtype):
    net = head(dropout=0.0)
    assert torch.equal(api_loss(net(X, Y.to(dtype))), api_loss(net(X, Y)))


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_labels_out_of_range_are_named(label):
    with pytest.raises(ValueError, match=rf"\[0, 3\).*got {label}"):
        api_loss(head()(X, torch.where(Y == 1, label, 0)))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (tuple(mine_pairs(X, Y)), TypeError, "Pairs, got tuple"),
        (pairs(valid=torch.ones(3, dtype=torch.bool)), ValueError, r"bool \[3\]"),
        (pairs(valid=torch.ones(8, dtype=torch.long)), ValueError, "valid bool"),
        (pairs(partner=torch.full((8,), 4)), ValueError, r"rows of features float32 \[4, 8\]"),
        (pairs(partner=torch.zeros(8)), ValueError, "integer dtype"),
        (pairs(partner=torch.zeros(7, dtype=torch.long)), ValueError, r"int64 \[7\]"),
    ],
)
def test_pairs_that_do_not_fit(wrong, error, message):
    with pytest.raises(error, match=message):
        head()(X, Y, pairs=wrong)


@pytest.mark.parametrize(("name", "value"), [("margin", float("nan")), ("rank_weight", float("inf"))])
def test_weights_of_the_loss_are_finite(name, value):
    with pytest.raises(ValueError, match="must be finite"):
        api_loss(head()(X, Y), **{name: value})


def test_dropout_is_a_share():
    with pytest.raises(ValueError, match="dropout must be in"):
        head(dropout=float("nan"))


def test_tensors_of_inference_mode_stay_there():
    with torch.inference_mode():
        made, memory = X.clone(), FeatureMemory(4, 8)
    with pytest.raises(ValueError, match=r"inference mode.*\.clone\(\)"):
        head()(made, Y)
    with pytest.raises(ValueError, match="inference mode"):
        memory.push(X, Y)
    assert Pairs(*mine_pairs(made, Y)).valid.all()
