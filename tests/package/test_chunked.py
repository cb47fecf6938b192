"""`ChunkedBackbone`: what runs and what is kept, outputs of any structure, errors.

test_chunked_replay.py compares with the chunks run one after the other, for all kinds of backbones.
"""

import weakref
from contextlib import nullcontext

import pytest
import torch
from chunks import assert_same_gradients, assert_same_statistics, batch, chunked_and_plain, small
from stand_ins import Calling
from torch import nn

from apinet_head import APINet, ChunkedBackbone, api_loss


def test_beside_a_pass_of_the_same_backbone_without_chunks():
    # Both graphs hold the running statistics; keeping them for one must not look like a change to the other.
    chunked, reference, plain = chunked_and_plain(small())
    for run, backbone in ((chunked, chunked.backbone), (reference, plain)):
        torch.manual_seed(1)
        (backbone(batch(6)).square().sum() + run(batch(10)).square().sum()).backward()
    assert_same_gradients(chunked, plain)
    assert_same_statistics(chunked, plain)


def counting():
    """A backbone, and a list that fills with how many images each of its calls has."""
    backbone, calls = small(), []
    backbone.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return backbone, calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("keep", "backward"), [(0, [2, 4, 4]), (1, [4, 4]), (2, [4]), (3, []), (9, [])])
def test_chunks_that_are_not_kept_run_once_more_for_their_gradient(training, keep, backward):
    backbone, calls = counting()
    features = ChunkedBackbone(backbone.train(training), 4, keep=keep)(batch(10))
    assert calls == [4, 4, 2]
    features.sum().backward()
    assert calls[3:] == backward


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_only_kept_chunks_hold_what_they_computed(keep):
    held = []

    def compute(images):
        maps = 2 * images
        held.append(weakref.ref(maps))
        return maps.exp().mean((1, 2, 3)) * maps.square().mean((1, 2, 3))

    features = ChunkedBackbone(Calling(compute), 4, keep=keep)(batch(12).requires_grad_())
    assert [one() is not None for one in held] == [place >= 3 - keep for place in range(3)]
    assert features.requires_grad


@pytest.mark.parametrize(("frozen", "mode"), [(True, nullcontext), (False, torch.no_grad)])
def test_without_gradient_nothing_runs_twice(frozen, mode):
    backbone, calls = counting()
    with mode():
        assert not ChunkedBackbone(backbone.requires_grad_(not frozen), 4)(batch(10)).requires_grad
    assert calls == [4, 4, 2]


@pytest.mark.parametrize("keep", [{}, {"keep_chunks": 0}, {"keep_chunks": 2}])
def test_apinet_in_chunks_has_the_same_names_and_gradients(keep):
    torch.manual_seed(0)
    whole = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}).double()
    chunked = APINet("test_vit", 4, dropout=0.0, backbone_args={"img_size": 32}, chunk_size=3, **keep).double()
    chunked.load_state_dict(whole.state_dict())
    labels = torch.arange(8) % 4
    losses = [api_loss(net(batch(8), labels)) for net in (whole, chunked)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*map(torch.autograd.grad, losses, (whole.parameters(), chunked.parameters())))
    assert chunked.eval()(batch(8)).shape == (8, 4)


@pytest.mark.parametrize("keep", [0, 1])
def test_other_outputs_than_one_tensor(keep):
    backbone = Calling(lambda x: {"maps": [x.exp(), x.mean((2, 3))], "features": x[:, 0], "stride": 4, "mask": None})
    images = [batch(10).requires_grad_() for _ in range(2)]
    expected, found = backbone(images[0]), ChunkedBackbone(backbone, 4, keep=keep)(images[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for output in (expected, found):
        (output["features"].sum() + output["maps"][0].square().sum()).backward()
    assert torch.equal(images[1].grad, images[0].grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChunkedBackbone(small(), 4, keep=-1), "keep must be at least 0, got -1"),
        (lambda: APINet("test_resnet", 4, keep_chunks=-1), "keep_chunks must be at least 0, got -1"),
    ],
)
def test_a_number_of_kept_chunks_is_not_negative(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chunk_size_that_was_set_later_is_checked_too():
    net = APINet("test_resnet", 4, chunk_size=2)
    net.chunk_size = 0
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        net(batch(4).float())


@pytest.mark.parametrize(("size", "chunk_size"), [(9, 4), (3, 1)])
def test_a_chunk_of_one_image_is_an_error_with_batch_norm_in_train_mode(size, chunk_size):
    message = rf"chunk_size={chunk_size} leaves a chunk of one image of float64 \[{size}, 3, 32, 32\]"
    with pytest.raises(ValueError, match=message):
        ChunkedBackbone(small(), chunk_size)(batch(size))
    # InstanceNorm has running statistics too, but looks at each image by itself.
    alone = small(lambda channels: nn.InstanceNorm2d(channels, track_running_stats=True))
    for backbone in (small().eval(), alone):
        assert ChunkedBackbone(backbone, chunk_size)(batch(size)).shape == (size, 8)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.mean, r"cannot be joined over chunks: it has float64 \[\] on cpu and float64"),
        (len, r"cannot be joined over chunks: it has 4 and 2, where tensors"),
    ],
)
def test_outputs_that_cannot_be_joined_are_an_error(output, message):
    with pytest.raises(ValueError, match=message):
        ChunkedBackbone(Calling(output), 4)(batch(6))


def test_a_net_does_not_take_several_outputs():
    with pytest.raises(TypeError, match=r"features must be a tensor \[B, D\], got tuple"):
        APINet(Calling(lambda images: (images, images)), 4, dim=3, chunk_size=4)(batch(8))
