"""What doesn't fit is an error that shows it, where test_fuzz.py doesn't look; what isn't finite shows in the loss."""

import pytest
import torch
from stand_ins import Calling

from apinet_head import APIHead, BalancedBatchSampler, ChunkedBackbone, api_loss, mine_pairs, random_pairs
from apinet_head.mutual import MUTUALS, MutualMLP
from apinet_head.step_memory import pick_chunk_size, step_memory

X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])


def head(**arguments):
    return APIHead(8, 3, hidden_dim=4, **arguments)


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


def test_an_index_error_of_ones_own_comes_through():
    with pytest.raises(IndexError, match="pop from empty list"):
        head(mutual=Calling(lambda *_: [].pop()))(X, Y)


@pytest.mark.parametrize("fault", [lambda a, b: None, lambda a, b: a[:1], lambda a, b: [a]])
def test_a_mutual_vector_of_another_shape_is_an_error(fault):
    with pytest.raises(ValueError, match=r"mutual must map two \[P, D\] to \[P, D\], got"):
        head(mutual=Calling(fault))(X, Y)


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


BACKBONE = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: head()(X, Y, pairs=(*mine_pairs(X, Y),)), TypeError, r"pairs must be a Pairs, got tuple"),
        (lambda: head()(X, classifier=(BACKBONE,) * 2), TypeError, r"\[N, 8\].*got tuple; of a model with"),
        (lambda: ChunkedBackbone([BACKBONE], 4), TypeError, r"must be a module, got list: nn\.Sequential\(\*backbone"),
        (lambda: api_loss((X, X, Y)), TypeError, r"APIOutput, got tuple"),
        (lambda: step_memory(BACKBONE, 4.0, 4), TypeError, r"batch_size must be an int, got 4\.0"),
        (lambda: step_memory([BACKBONE], 4, 4), TypeError, r"net must be a module, got list"),
        (lambda: step_memory(BACKBONE, 4, 0), ValueError, r"image_size must be at least 1, got 0"),
        (lambda: step_memory(BACKBONE, 4, (3, 0, 4)), ValueError, r"image_size must be at least 1, got 0"),
        (
            lambda: pick_chunk_size(BACKBONE, 4, 4, memory=torch.nan),
            ValueError,
            r"memory must be in \[0, inf\), got nan",
        ),
        (lambda: BalancedBatchSampler([], 2, 1), ValueError, r"n_classes=2 classes: labels have 0"),
        (lambda: BalancedBatchSampler(Y, 2).state_dict(2), ValueError, r"batches_done must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_arguments_are_an_error_that_shows_them(call, error, message):
    with pytest.raises(error, match=message):
        call()
