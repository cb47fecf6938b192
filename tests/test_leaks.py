"""A training that goes on and on needs no more memory than at its beginning."""

import gc
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from apinet_head import APINet, ChunkedBackbone, FeatureMemory, api_loss

# All that happens once, such as the optimiser's state and the allocator's pools, happens in the warm-up.
WARM_UP, STEPS = 400, 2000
SIZE, CHANNELS, CLASSES = 8, 16, 4


def training(device):
    """A function that takes a step: chunks, mining in batch and memory, head, loss and optimiser."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = APINet(ChunkedBackbone(backbone, 5), CLASSES, dim=CHANNELS, hidden_dim=8).to(device)
    memory = FeatureMemory(32, CHANNELS, device=device)
    optimizer = torch.optim.Adam(net.parameter_groups(1e-4))
    labels = torch.arange(SIZE, device=device) % CLASSES

    def step():
        features = net.backbone(torch.randn(SIZE, 3, 8, 8, device=device))
        keys, key_labels = torch.cat([features, memory.features]), torch.cat([labels, memory.labels])
        loss = api_loss(net.head(features, labels, keys=keys, key_labels=key_labels, key_offset=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        memory.push(features, labels)

    return step


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def take_all_steps() -> None:
    """Fails if tensors or memory grow; for a process of its own, as what other tests leave comes and goes."""
    step, process = training("cpu"), psutil.Process()
    for _ in range(WARM_UP):
        step()
    tensors, before = live_tensors(), process.memory_info().rss
    for _ in range(STEPS):
        step()
    assert live_tensors() == tensors
    # A step has over 100 KiB of tensors: were a hundredth part of it kept, there would be 2 MiB more.
    growth = process.memory_info().rss - before
    assert growth < 2 * 2**20, growth


def test_memory_of_the_process_and_tensors_are_as_many_after_2000_steps():
    code = "import test_leaks; test_leaks.take_all_steps()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


@pytest.mark.gpu
def test_memory_of_the_device_is_as_much_after_2000_steps():
    step = training("cuda")
    for _ in range(WARM_UP):
        step()
    tensors, before = live_tensors(), torch.cuda.memory_allocated()
    for _ in range(STEPS):
        step()
    assert live_tensors() == tensors
    assert torch.cuda.memory_allocated() == before
