"""What doesn't fit is an error that shows it, where test_fuzz.py doesn't look; what isn't finite shows in the loss."""

import pytest
import torch
from stand_ins import Calling

from apinet_head import APIHead, BalancedBatchSampler, ChunkedBackbone, FeatureMemory, api_loss, mine_pairs
from apinet_head.step_memory import pick_chunk_size, step_memory

X, Y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1])


def head(**arguments):
    return APIHead(8, 3, hidden_dim=4, **arguments)


def test_features_that_are_all_nan_give_a_loss_that_is():
    # No pair is left; a loss of 0 would hide gradients that aren't finite.
    assert api_loss(head()(torch.full_like(X, torch.nan), Y)).isnan()
    assert api_loss(head()(torch.full((2, 8), torch.nan), torch.zeros(2, dtype=torch.long))).isnan()


BACKBONE = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
AUTOCAST = torch.autocast("cpu", dtype=torch.bfloat16)
OTHER_IMAGES = {"keys": torch.cat([X + 1, X]), "key_labels": torch.cat([Y + 5, Y]), "key_offset": 0}
IN_AUTOCAST = r"float32 or of autocast's dtype, got float16 \[4, 8\].*float32"
OFFSET = "row 0 of keys is query 0, but key_labels has 5 there, and labels 0"
MUTUAL = r"mutual must map two \[P, D\] to \[P, D\], got"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AUTOCAST(head())(X.half(), Y), ValueError, IN_AUTOCAST),
        (lambda: head(mutual=Calling(lambda a, b: None))(X, Y), ValueError, MUTUAL),
        (lambda: head(mutual=Calling(lambda a, b: a[:1]))(X, Y), ValueError, MUTUAL),
        (lambda: head(mutual=Calling(lambda a, b: [a]))(X, Y), ValueError, MUTUAL),
        (lambda: head(mutual=Calling(lambda a, b: [].pop()))(X, Y), IndexError, "pop from empty list"),  # one's own
        (lambda: mine_pairs(X, Y, **OTHER_IMAGES), ValueError, OFFSET),
        (lambda: head()(X, Y, pairs=(*mine_pairs(X, Y),)), TypeError, r"pairs must be a Pairs, got tuple"),
        (lambda: head()(X, classifier=(BACKBONE,) * 2), TypeError, r"\[N, 8\].*got tuple; of a model with"),
        (lambda: ChunkedBackbone([BACKBONE], 4), TypeError, r"must be a module, got list: nn\.Sequential\(\*backbone"),
        (lambda: api_loss((X, X, Y)), TypeError, r"APIOutput, got tuple"),
        (lambda: step_memory(BACKBONE, 4.0, 4), TypeError, r"batch_size must be an int, got 4\.0"),
        (lambda: step_memory([BACKBONE], 4, 4), TypeError, r"net must be a module, got list"),
        (lambda: step_memory(BACKBONE, 4, 0), ValueError, r"image_size must be at least 1, got 0"),
        (lambda: step_memory(BACKBONE, 4, (3, 0, 4)), ValueError, r"image_size must be at least 1, got 0"),
        (lambda: pick_chunk_size(BACKBONE, 4, 4, memory=torch.nan), ValueError, r"must be in \[0, inf\), got nan"),
        (lambda: BalancedBatchSampler([], 2, 1), ValueError, r"n_classes=2 classes: labels have 0"),
        (lambda: BalancedBatchSampler(Y, 2).state_dict(2), ValueError, r"batches_done must be in \[0, 1\], got 2"),
        (lambda: FeatureMemory(9, 8, device="meta").push(X, Y), ValueError, "features and the memory must be.*cpu"),
    ],
)
def test_wrong_arguments_are_an_error_that_shows_them(call, error, message):
    with pytest.raises(error, match=message):
        call()
