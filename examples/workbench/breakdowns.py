"""What breaks around a run: processes that load images die or hang, memory runs out. It ends with what to do."""

import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from torch import nn

from workbench.chunk_size import chunks_that_fit
from workbench.run_folder import RunFolder
from workbench.settings import Settings

# torch raises RuntimeErrors for all. What a worker raises itself comes as "Caught ... in DataLoader worker process".
DEAD = r"DataLoader worker \(pid|Pin memory thread exited|unable to .*shared memory"
SLOW = r"DataLoader timed out"
FULL = r"DefaultCPUAllocator: (can't allocate|not enough) memory|MPS backend out of memory"


@contextmanager
def end_with_advice(
    settings: Settings, folder: RunFolder, net: nn.Module, make_net: Callable[[Settings], nn.Module]
) -> Iterator[None]:
    """To be entered around the training.

    Raises:
        SystemExit: such an error came up in the block; the message says what to try.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error).strip()
        if isinstance(error, torch.cuda.OutOfMemoryError) or re.search(FULL, said):
            advice = about_memory(settings, folder, net.training, make_net)
        elif re.search(SLOW, said):
            advice = about_slow_workers(settings)
        elif re.search(DEAD, said):
            advice = about_dead_workers(settings)
        else:
            raise
        kill_workers()
        raise SystemExit(f"\n{said}\n{advice}\n{folder.way_on()}") from error


def about_dead_workers(settings: Settings) -> str:
    return (
        f'A process that loads images died, one of {settings.workers}. "Killed" is most often the system\'s answer to '
        f"memory that runs out (`dmesg` tells): take fewer, --workers {settings.workers // 2}, and no --cache-images, "
        'of which each has its own. "Bus error" and shared memory that can\'t be had mean that /dev/shm is full '
        "(`df -h /dev/shm`; in a container, more of it by `docker run --shm-size 8g`). With --workers 0 this process "
        "loads the images itself, and an error of the images shows."
    )


def about_slow_workers(settings: Settings) -> str:
    return (
        f"No batch of images came for {settings.loader_timeout:g} s. Look whether the file system of "
        f"{settings.data or 'the embedded birds'} answers, and whether /dev/shm (`df -h /dev/shm`) or the machine's "
        f"memory is full, for which fewer processes would help: --workers {settings.workers // 2}. If loading is only "
        f"slow, give it longer: --loader-timeout {2 * settings.loader_timeout:g}."
    )


def about_memory(
    settings: Settings, folder: RunFolder, training: bool, make_net: Callable[[Settings], nn.Module]
) -> str:
    """With the chunk size that would fit, if training was what took too much."""
    if not training:
        return (
            f"That was the test, of {settings.eval_batch} images at a time: take fewer, "
            f"--eval-batch {max(settings.eval_batch // 2, 1)}."
        )
    batch = settings.n_classes * settings.n_samples // PartialState().num_processes
    now = f"in chunks of {settings.chunk_size}" if settings.chunk_size else "as a whole (--chunk-size 0)"
    keeps = "A run that has trained keeps its chunk size: with another, choose another --output too. "
    return (
        f"The step was one of {batch} images of {settings.crop} x {settings.crop} pixels, which went through the "
        f"backbone {now}. {smaller_chunks(settings, batch, make_net)} {keeps if folder.checkpoints.names() else ''}"
        "Less memory is also needed by --amp bf16, a smaller --crop, and fewer --n-classes in a batch."
    )


def smaller_chunks(settings: Settings, batch: int, make_net: Callable[[Settings], nn.Module]) -> str:
    """What the estimate says, also if it can't be right or there is none."""
    used = int(settings.chunk_size) or batch
    half = f"try --chunk-size {max(used // 2, 1)}"
    try:
        choice = chunks_that_fit(settings, make_net)
    except (ValueError, RuntimeError) as error:
        return f"No chunk size is known to fit ({error})."
    if (choice.chunk_size or batch) >= used:
        return f"By estimate that should have fit, {choice}; look what else takes memory, or {half}."
    return f"What fits, by estimate, is --chunk-size {choice.chunk_size}: {choice}."


def kill_workers() -> None:
    """Else this process would wait at its end for those that hang; they don't follow SIGTERM, see augmentation.py."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None  # torch's raises with each that dies
    children = multiprocessing.active_children()
    for child in children:
        child.kill()
    for child in children:
        child.join(10)
    if main:
        signal.signal(signal.SIGCHLD, handler)
