"""What doesn't fit is an error that shows it, and what isn't finite shows in the loss."""

import pytest
import torch

from apinet_head import (
    APIHead,
    APINet,
    BalancedBatchSampler,
    ChunkedBackbone,
    FeatureMemory,
    api_loss,
    explain_pair,
    load_official_checkpoint,
    mine_pairs,
    random_pairs,
)
from apinet_head.mutual import MUTUALS, MutualMLP
from apinet_head.step_memory import pick_chunk_size, step_memory

X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])


def head(**arguments):
    return APIHead(8, 3, hidden_dim=4, **arguments)


def pairs(**fields):
    return mine_pairs(X, Y)._replace(**fields)


def test_features_that_are_all_nan_give_a_loss_that_is():
    # No pair is left; a loss of 0 would hide gradients that aren't finite.
    assert api_loss(head()(torch.full_like(X, torch.nan), Y)).isnan()
    assert api_loss(head()(torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.long))).isnan()


def test_an_empty_batch_has_a_loss_of_0_with_any_mutual_vector():
    for mutual in MUTUALS:
        net = head(mutual=mutual)
        loss = api_loss(net(X[:0].requires_grad_(), Y[:0]))
        loss.backward()
        assert loss == 0, mutual
        assert net(X, Y, pairs=random_pairs(Y, 0)).logits_self.shape == (0, 3)


def test_autocast_takes_float32_and_its_own_half_precision():
    net = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        api_loss(net(X.bfloat16(), Y)).backward()
        with pytest.raises(ValueError, match=r"float32 or of autocast's dtype, got float16 \[4, 8\].*float32"):
            net(X.half(), Y)


class Faulty(torch.nn.Module):
    """A mutual vector of one's own, with a fault of one's own."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def forward(self, anchor, partner):
        return self.fault(anchor)


def test_an_index_error_of_ones_own_comes_through():
    with pytest.raises(IndexError, match="mine alone"):
        head(mutual=Faulty(lambda x: exec("raise IndexError('mine alone')")))(X, Y)


@pytest.mark.parametrize("fault", [lambda x: None, lambda x: x[:1], lambda x: [x]])
def test_a_mutual_vector_of_another_shape_is_an_error(fault):
    with pytest.raises(ValueError, match=r"mutual must map two \[P, D\] to \[P, D\], got"):
        head(mutual=Faulty(fault))(X, Y)


def test_a_mutual_vector_derived_from_the_papers_is_asked():
    class Halved(MutualMLP):
        def forward(self, anchor, partner):
            return super().forward(anchor, partner) / 2

    net = head(mutual=Halved(8, 4, 0.0), dropout=0.0)
    pairs = mine_pairs(X, Y)
    images = X[pairs.anchor], X[pairs.partner]
    assert torch.equal(net.gates(X, pairs)[0], torch.sigmoid(net.mutual(*images) * images[0]))


def test_an_offset_at_which_other_images_are_is_noticed():
    keys, key_labels = torch.cat([X + 1, X]), torch.cat([Y + 5, Y])
    assert mine_pairs(X, Y, keys=keys, key_labels=key_labels, key_offset=4).valid.all()
    with pytest.raises(ValueError, match=r"row 0 of keys is query 0, but key_labels has 5 there, and labels 0"):
        mine_pairs(X, Y, keys=keys, key_labels=key_labels, key_offset=0)


NAN = float("nan")
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
FLAT = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


def explainable():
    net = APINet(FLAT, 3, dim=3)
    net.backbone.forward_features = lambda images: images
    return net


WRONG_TYPES = [
    (lambda: head()(X, Y, pairs=tuple(mine_pairs(X, Y))), r"pairs must be a Pairs, got tuple"),
    (
        lambda: head()(X, classifier=(torch.nn.Linear(8, 3), torch.nn.Linear(8, 3))),
        r"\[N, 8\].*got tuple; of a model with",
    ),
    (lambda: ChunkedBackbone([FLAT], 4), r"backbone must be a module, got list: nn\.Sequential\(\*backbone"),
    (lambda: ChunkedBackbone(FLAT, 2)([IMAGES]), r"images must be a tensor \[B, \.\.\.\].* got list"),
    (lambda: APINet([FLAT], 3, dim=3), r"backbone must be a module, got list"),
    (lambda: random_pairs(Y, 2, generator=0), r"generator must be a torch\.Generator or None, got int"),
    (lambda: api_loss((X, X, Y)), r"APIOutput, got tuple"),
    (lambda: explain_pair(FLAT, IMAGES), r"net must be an APINet, got Sequential"),
    (lambda: explain_pair(explainable(), IMAGES.tolist()), r"images must be a tensor .* got list"),
    (lambda: step_memory(FLAT, 4.0, 4), r"batch_size must be an int, got 4\.0"),
    (lambda: step_memory([FLAT], 4, 4), r"net must be a module, got list"),
    (lambda: load_official_checkpoint(3), r"source must be a path or a dict, got int"),
]
WRONG_VALUES = [
    (lambda: head()(X, Y, pairs=pairs(partner=torch.full((8,), 4))), r"partner must be rows of .*\[4, 8\].* got 4"),
    (lambda: head()(X, Y, pairs=pairs(anchor=torch.full((8,), -1))), r"anchor must be rows of .*\[4, 8\].* got -1"),
    (lambda: head()(X, Y, pairs=pairs(valid=torch.ones(3, dtype=torch.bool))), r"bool \[3\]"),
    (lambda: head()(X, Y, pairs=pairs(valid=torch.ones(8, dtype=torch.long))), "valid must be bool"),
    (lambda: head()(X, Y, pairs=pairs(partner=torch.zeros(8))), "integer dtype"),
    (lambda: head()(X, Y, pairs=pairs(partner=torch.zeros(7, dtype=torch.long))), r"int64 \[7\]"),
    (lambda: api_loss(head()(X, torch.where(Y == 1, 3, 0))), r"\[0, 3\).*got 3"),
    (lambda: BalancedBatchSampler([0, 0, NAN, NAN], 2, 1), r"integer dtype, got float32 \[4\]"),
    (lambda: BalancedBatchSampler(["a", "b"], 2, 1), r"ints, or a tensor or array of them, got \['a'"),
    (lambda: BalancedBatchSampler([], 2, 1), r"n_classes=2 classes: labels have 0"),
    (lambda: BalancedBatchSampler([0, 1], 2, 1).state_dict(2), r"batches_done must be in \[0, 1\], got 2"),
    (lambda: APINet(FLAT, 3, dim=3).parameter_groups(NAN), r"lr must be in \[0, inf\), got nan"),
    (lambda: APINet(FLAT, 3, dim=3).parameter_groups(0.1, -1), r"backbone_lr must be in \[0, inf\), got -1"),
    (lambda: APIHead(8, dtype=torch.int64), r"dtype must be float16.* got torch\.int64"),
    (lambda: FeatureMemory(4, 8, dtype=torch.bool), r"dtype must be float16.* got torch\.bool"),
    (lambda: mine_pairs(X, Y.to_sparse()), r"labels must be a dense tensor"),
    (lambda: explain_pair(explainable(), IMAGES[..., :0]), r"at least one pixel, got float32 \[2, 3, 4, 0\]"),
    (lambda: explain_pair(explainable(), IMAGES * NAN, top_k=1), r"features or gates.*\[2, 3, 4, 4\].*not finite"),
    (lambda: step_memory(FLAT, 4, 0), r"image_size must be at least 1, got 0"),
    (lambda: step_memory(FLAT, 4, (3, 0, 4)), r"image_size must be at least 1, got 0"),
    (lambda: pick_chunk_size(FLAT, 4, 4, memory=NAN), r"memory must be in \[0, inf\), got nan"),
]


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES)
def test_arguments_of_a_wrong_type_are_a_type_error_that_shows_them(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_VALUES)
def test_arguments_of_a_wrong_value_are_a_value_error_that_shows_them(call, message):
    with pytest.raises(ValueError, match=message):
        call()
