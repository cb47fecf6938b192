"""A step of training on one's own images, and what ends it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import train_own as own_train
from apinet_head import api_loss
from workbench.own_training import advice_on_memory, make_net, step

FLAGS = ["DIR", "--backbone", "test_resnet", "--image-size", "32", "--no-pretrained", "--device", "cpu"]


@pytest.mark.parametrize("flags", [[], ["--baseline"]])
def test_a_step_learns_by_the_loss_of_its_method(flags):
    torch.manual_seed(0)
    options = own_train.make_parser().parse_args([*FLAGS, *flags])
    net, _ = make_net(options, 2)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    twin = copy.deepcopy(net)
    torch.manual_seed(0)  # of the dropout
    loss = F.cross_entropy(twin(images), labels) if flags else api_loss(twin(images, labels))
    loss.backward()
    torch.manual_seed(0)
    found, right = step(net, images, labels, torch.optim.SGD(net.parameters(), 0.5), options)
    assert found == pytest.approx(loss.item())
    assert len(right) == (4 if flags else 16)
    for learned, weights in zip(net.parameters(), twin.parameters(), strict=True):
        moved = weights if weights.grad is None else weights - 0.5 * weights.grad
        torch.testing.assert_close(learned, moved, atol=1e-5, rtol=1e-4)


def test_loss_that_is_not_finite_ends_the_run():
    options = own_train.make_parser().parse_args([*FLAGS, "--lr", "0.1"])
    net, _ = make_net(options, 2)
    images = torch.full((4, 3, 32, 32), float("nan"))
    with pytest.raises(SystemExit, match=r"the loss is nan: try a lower --lr than 0.1"):
        step(net, images, torch.tensor([0, 0, 1, 1]), torch.optim.SGD(net.parameters()), options)


def test_memory_that_runs_out_ends_with_a_chunk_size():
    options = own_train.make_parser().parse_args([*FLAGS, "--n-classes", "8", "--n-samples", "4"])
    with (
        pytest.raises(SystemExit, match=r"32 images of 32 x 32 pixels, all at once\. .*--chunk-size 16;"),
        advice_on_memory(options),
    ):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
