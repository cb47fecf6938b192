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
from harness import Point, reason
from torch import Tensor

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CAN_MEASURE_GROWTH = STATUS.exists() and CLEAR.exists()  # a Linux that keeps these figures
MMAP = "MALLOC_MMAP_THRESHOLD_"  # glibc reuses what was freed; told so, it maps new memory for all above a page
Prepare = Callable[[], Callable[[], object]]


def memory_of(
    prepare: Prepare, device: torch.device, grow: Callable[..., int], *args: Any, seconds: float = 120
) -> Point:
    """Bytes that a call takes at most: on CUDA of the one prepared here, else what `grow` returns in a fresh process.

    On CUDA also the waits of the host. Where there is no figure, "memory absent" says why.
    """
    if device.type == "cuda":
        try:
            return cost_on_device(prepare, device)
        except torch.cuda.OutOfMemoryError as error:
            return {"memory absent": reason(error)}
    if not CAN_MEASURE_GROWTH:
        return {}
    grown, failure = in_fresh_process(grow, *args, seconds=seconds)
    return {"memory": grown} if failure is None else {"memory absent": failure}


def cost_on_device(prepare: Prepare, device: torch.device) -> Point:
    """Bytes beyond what is taken when it starts, its preparation included; and waits, by PyTorch's own account."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call = prepare()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize(device)
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return {"memory": torch.cuda.max_memory_allocated(device) - before, "syncs": waits}


def growth_of_process(call: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grows at most during a call.

    Linux keeps the largest resident set, and counts it in steps of some ten pages for each core. What earlier calls
    left to the allocator would hide some of the growth, so this is for a fresh process.
    """
    CLEAR.write_text("5")  # the largest resident set is now the present one
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    return 1024 * int(STATUS.read_text().partition(f"{name}:")[2].split()[0])


def in_fresh_process(work: Callable[..., Any], *arguments: Any, seconds: float) -> tuple[Any, str | None]:
    """The result of a function of a module, run in a process that has done nothing yet; or why there is none."""
    _start_server()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, torch.get_num_threads(), work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else (None, f"took more than {seconds:.0f} s")
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
    os.environ[MMAP] = "4096"
    forkserver.ensure_running()
    del os.environ[MMAP]


def _send(sender: Connection, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    try:
        sender.send((work(*arguments), None))
    except Exception as error:  # it is reported, in place of the figure
        sender.send((None, reason(error)))


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
