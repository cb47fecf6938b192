"""What protects a run: early checks of flags, graceful shutdown, non-finite steps, advice when memory runs out."""

import difflib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from workbench.distributed import highest


def check_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU, if there is one."""
    there = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(there if name == "auto" else name)
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # which accelerate takes
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SystemExit(f"--device {name} is not available: torch finds {there}") from None
    return device


def check_backbone(name: str) -> Any:
    """timm's configuration of a model, None if it has no weights."""
    if name.startswith("local-dir:"):  # a net of this name could not be saved without the path
        advice = "give the architecture that the folder's config.json names, and the folder as --weights"
        raise SystemExit(f"--backbone {name}: {advice}")
    if name.startswith("hf-hub:"):
        return None  # only the Hub knows it
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5] or difflib.get_close_matches(name, timm.list_models(), 5))
        raise SystemExit(f"--backbone {name}: timm has no such model{f'; near: {near}' if near else ''}")
    return timm.get_pretrained_cfg(name)


@contextmanager
def making_the_net(backbone: str, *, pretrained: bool, instead: str) -> Iterator[None]:
    """Wraps the creation of a net: turns wrong arguments and failed downloads into one-line errors."""
    try:
        yield
    except Exception as error:  # of the backbone, the Hub's client, the network, the file system: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not pretrained or isinstance(error, TypeError | AssertionError):
            raise SystemExit(f"--backbone {backbone}: {reason}") from None
        missing = f"the pretrained weights of {backbone} are not available: {reason}"
        why = "The first time, they are downloaded from the Hugging Face Hub, which needs the network"
        raise SystemExit(f"{missing}\n{why}; {instead} trains from scratch") from None


@contextmanager
def noting_signals() -> Iterator[SimpleNamespace]:
    """Records SIGTERM and SIGINT in `signal` instead of ending, so that the step can be finished and saved."""
    noted = SimpleNamespace(signal=0)

    def note(number: int, _: FrameType | None) -> None:
        # Only the first is reported: torchrun forwards what the terminal has sent to all processes already.
        if not noted.signal:
            said = f"\n{signal.Signals(number).name}: finishing the step and saving (SIGKILL ends at once)\n"
            os.write(2, said.encode())  # not print(), which fails if the signal interrupted another print()
        noted.signal = number

    heeded = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}  # nohup and background jobs ignore some
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def nonfinite(terms: dict[str, Tensor], parameters: Iterable[nn.Parameter]) -> str:
    """What is infinite or NaN of the loss's terms and the gradients, "" if nothing is; the same on all processes.

    Call it on all processes between the backward pass and the optimiser's step. It synchronises with the device once a
    step, which costs little, as kernels are queued faster than they run.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    figures = {name: value.detach().float() for name, value in terms.items()}
    if gradients:
        figures["norm of the gradients"] = torch.nn.utils.get_total_norm(gradients).float()
    values = torch.stack(list(figures.values()))
    if not highest([not bool(values.isfinite().all())])[0]:
        return ""
    return ", ".join(f"{name} {value:g}" for name, value in zip(figures, values.tolist(), strict=True))


@contextmanager
def advice_on_memory(net: nn.Module, batch: int, size: int, chunk_size: int) -> Iterator[None]:
    """Wraps the training: when a GPU runs out of memory, the command ends with advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        chunks = f"in chunks of {chunk_size}" if chunk_size else "all at once"
        less = f"--chunk-size {max(2, (chunk_size or batch) // 2)} takes less memory for the same batch"
        what = f"The step was one of {batch} images of {size} x {size} pixels, through the backbone {chunks}: {less};"
        if not net.training:
            what = "That was the test, not a training step: take fewer images at a time;"
        also = "less is also needed with --amp bf16, smaller images or fewer --n-classes"
        raise SystemExit(f"\n{error}\n{what} {also}") from None
