"""A training that goes on and on needs no more memory than at its beginning."""

import gc
import itertools
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from apinet_head import APILoss, APINet, ChunkedBackbone, api_loss_terms

# All that happens once, such as the optimiser's state and the allocator's pools, happens in the warm-up.
WARM_UP, STEPS, PARTS = 300, 1000, 4
SIZE, CHANNELS, CLASSES = 8, 16, 4


def training(device):
    """A function that takes a step: chunks, mining in batch and memory, head, loss in one of two ways, optimiser."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = APINet(ChunkedBackbone(backbone, 5), CLASSES, dim=CHANNELS, hidden_dim=8, memory=32).to(device)
    optimizer = torch.optim.Adam(net.parameter_groups(1e-4))
    labels, criterions = torch.arange(SIZE, device=device) % CLASSES, cycle([None, APILoss(rows=16)])

    def step():
        output = net(torch.randn(SIZE, 3, 8, 8, device=device), labels, criterion=(criterion := next(criterions)))
        loss = (api_loss_terms(output) if criterion is None else output).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def take_all_steps() -> None:
    """Fails if tensors or memory grow; for a process of its own, as what other tests leave comes and goes."""
    step, process = training("cpu"), psutil.Process()
    for _ in range(WARM_UP):
        step()
    tensors, sizes = live_tensors(), [process.memory_info().rss]
    for _ in range(PARTS):
        for _ in range(STEPS // PARTS):
            step()
        sizes.append(process.memory_info().rss)
    assert live_tensors() == tensors
    # A step has over 100 KiB of tensors. A leak of a hundredth part of it adds 250 KiB in every part of the training;
    # allocator and system grow now and then by more than that, but not in every part.
    growth = [after - before for before, after in itertools.pairwise(sizes)]
    assert min(growth) < 125 * 2**10, growth


def test_memory_of_the_process_and_tensors_are_as_many_after_1000_steps():
    code = "import test_leaks; test_leaks.take_all_steps()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


@pytest.mark.gpu
def test_memory_of_the_device_is_as_much_after_1000_steps():
    step = training("cuda")
    for _ in range(WARM_UP):
        step()
    tensors, before = live_tensors(), torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step()
    assert live_tensors() == tensors
    assert torch.cuda.memory_allocated() == before
