"""What a call costs beside time: memory, and waits of the host for the device."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from turns import reason

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc would put tensors where others were freed before, which the process has already; told so, it maps new memory for
# each that is larger than a page, and gives it back.
MMAP = "MALLOC_MMAP_THRESHOLD_"


def peak_on_device(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes of a CUDA device at most, beyond what is taken when it starts."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def growth_of_process(call: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grows at most during a call.

    Linux keeps the largest resident set of a process, and forgets it on demand; it counts in steps of some ten pages
    for each core. What an earlier call has left to the allocator would hide some of the growth, so this is for a fresh
    process: see `in_fresh_process`.
    """
    CLEAR.write_text("5")  # the largest resident set is now the present one
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def can_measure_growth() -> bool:
    """Whether the system is a Linux that keeps these figures."""
    return STATUS.exists() and CLEAR.exists()


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def in_fresh_process(work: Callable[..., Any], *arguments: Any, seconds: float) -> tuple[Any, str | None]:
    """The result of a function of a module, run in a process that has done nothing yet; or why there is none."""
    _start_server()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            return receiver.recv()
        return None, f"took more than {seconds:.0f} s"
    except EOFError:
        process.join()
        return None, "out of memory" if process.exitcode == -9 else f"its process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


@cache
def _start_server() -> None:
    """It imports what takes long to import, and does nothing else; each of the processes is a fork of it."""
    forkserver.set_forkserver_preload(["apinet_head", "timm", "pytorch_metric_learning.miners"])
    before = os.environ.get(MMAP)
    os.environ[MMAP] = "4096"
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(MMAP) if before is None else os.environ.update({MMAP: before})


def _send(sender: Connection, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send((work(*arguments), None))
    except Exception as error:  # it is reported, in place of the figure
        sender.send((None, reason(error)))


def count_syncs(call: Callable[[], object]) -> int:
    """How often a call makes the host wait for a CUDA device, by PyTorch's own account."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def saved_bytes(make_loss: Callable[[], Tensor], but: Iterable[Tensor]) -> tuple[int, Tensor]:
    """What the backward pass of a loss keeps, less the storages of the tensors `but`; and the loss."""
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = make_loss()
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in known), loss
