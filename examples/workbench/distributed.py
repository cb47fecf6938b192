"""The processes of a run: a single one, or those of torchrun, each with a GPU and a share of the images."""

import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def join_processes(device: str) -> PartialState:
    """Join the processes that torchrun started, if it did; to be called before anything else of accelerate."""
    if "LOCAL_RANK" not in os.environ:
        return PartialState(cpu=device == "cpu")
    started, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device == "cpu" or (device == "auto" and not gpus):
        return PartialState(cpu=True)  # without a GPU, accelerate starts several processes only with cpu=True
    if started > gpus:
        if os.environ["LOCAL_RANK"] != "0":
            _await_the_end()
        advice = f"--nproc_per_node={gpus}" if gpus else "--device cpu"
        raise SystemExit(f"torchrun started {started} processes here, each needs a GPU, torch finds {gpus}: {advice}")
    return PartialState(backend="cpu:gloo,cuda:nccl")  # with gloo, comparing shapes does not wait for the GPU


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block before the others; what it prints or raises is shown once.

    With accelerate's `main_process_first`, the others would add errors about a broken connection.
    """
    processes, done = PartialState(), [False]
    if not processes.is_main_process:
        broadcast_object_list(done)
        if not done[0]:
            _await_the_end()
        with redirect_stdout(io.StringIO()):
            yield
        return
    try:
        yield
        done = [True]
    finally:
        broadcast_object_list(done)


def _await_the_end() -> None:
    # torchrun ends all processes once one has failed; the first process must be able to print its error before.
    time.sleep(30)
    raise SystemExit(1)


def highest(values: Sequence[float]) -> list[float]:
    """The elementwise maximum of the values over all processes."""
    if PartialState().num_processes == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)  # on the CPU, unlike accelerate's: nothing synchronises
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def end_all(message: str, code: int) -> NoReturn:
    """End all processes; all must call it. The message is printed once."""
    process = PartialState()
    if process.is_main_process:
        print(f"\n{message}", file=sys.stderr, flush=True)
    process.wait_for_everyone()  # torchrun ends the others with the first that leaves
    raise SystemExit(code)


def average_gradients(net: nn.Module) -> nn.Module:
    """The net wrapped in DDP, so that backward() gives all processes the mean gradient.

    Wrap it again each epoch: DDP records at first which parameters learn, and later changes the order of its sums.
    """
    if PartialState().num_processes == 1:
        return net
    # static_graph: don't wait for gradients of what the loss doesn't depend on, such as the baseline's mutual vector.
    return DistributedDataParallel(net, static_graph=True)
