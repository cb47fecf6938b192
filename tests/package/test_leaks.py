"""A training that goes on and on needs no more memory than at its beginning."""

import ctypes
import gc
import subprocess
import sys
from itertools import cycle, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apinet_head import APILoss, APINet, ChunkedBackbone, api_loss_terms

# All that happens once, such as the optimiser's state and the allocator's pools, happens in the warm-up.
WARM_UP, STEPS, PARTS = 400, 800, 4
SIZE, CHANNELS, CLASSES = 8, 16, 4


def training(device):
    """A function that takes steps: chunks, mining in batch and memory, head, loss in one of two ways, optimiser."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = APINet(ChunkedBackbone(backbone, 5), CLASSES, dim=CHANNELS, hidden_dim=8, memory=32).to(device)
    optimizer = torch.optim.Adam(net.parameter_groups(1e-4))
    labels, criterions = torch.arange(SIZE, device=device) % CLASSES, cycle([None, APILoss(rows=16)])

    def take(steps):
        for _, criterion in zip(range(steps), criterions, strict=False):
            output = net(torch.randn(SIZE, 3, 8, 8, device=device), labels, criterion=criterion)
            loss = (api_loss_terms(output) if criterion is None else output).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return take


def live_tensors():
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


class MallInfo(ctypes.Structure):
    """What glibc says of its heap, see mallinfo(3)."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use() -> int:
    """Bytes that malloc gave out; 0 without glibc 2.33. The resident set grows by rules of the system's own."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    found = mallinfo()
    return found.uordblks + found.hblkhd


def take_all_steps() -> None:
    """Fails if tensors, bytes or objects grow; for a process of its own, as what other tests leave comes and goes."""
    take = training("cpu")
    take(WARM_UP)
    tensors, before, objects = live_tensors(), bytes_in_use(), [sys.getallocatedblocks()]
    for _ in range(PARTS):
        take(STEPS // PARTS)
        assert live_tensors() == tensors
        objects.append(sys.getallocatedblocks())
    # A step has over 100 KiB of tensors, and a thousandth of it is too much; caches fill by some 10 KiB in all.
    assert bytes_in_use() - before < 100 * STEPS
    # Python's own caches fill too, more slowly with every step; a leak adds an object in each step, or in every second.
    assert min(after - before for before, after in pairwise(objects)) < STEPS / PARTS / 2


def test_memory_of_the_process_and_tensors_are_as_many_after_800_steps():
    code = "import test_leaks; test_leaks.take_all_steps()"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


@pytest.mark.gpu
def test_memory_of_the_device_is_as_much_after_800_steps():
    take = training("cuda")
    take(WARM_UP)
    tensors, before = live_tensors(), torch.cuda.memory_allocated()
    take(STEPS)
    assert (live_tensors(), torch.cuda.memory_allocated()) == (tensors, before)
