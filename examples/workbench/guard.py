"""Steps whose loss or gradients are not finite: found before the update, so that no weight ever sees them."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from workbench.checkpoint import pack
from workbench.distributed import end_all, highest
from workbench.run_folder import Progress, RunFolder
from workbench.run_state import RunState


class NonFiniteError(ArithmeticError):
    """A step that must not be taken."""


class Before:
    """What a forward pass changes, as it was before: to undo a step that must not be taken, and to replay it."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.buffers = [buffer.clone() for buffer in state.buffers()]
        self.random_states = state.random_states()

    def restore_buffers(self) -> None:
        with torch.no_grad():
            for buffer, before in zip(self.state.buffers(), self.buffers, strict=True):
                buffer.copy_(before)

    def restore_chance(self) -> None:
        self.state.set_random_states(self.random_states)


def check_finite(terms: dict[str, Tensor], parameters: Iterable[nn.Parameter]) -> None:
    """To be called between backward and update, by all processes, and raises on all of them or none.

    This waits for the device once a step. It is a wait that should cost little: what comes next are the update and the
    next forward pass, whose kernels are queued faster than they run. To read the losses later, with the figures, the
    updates since would have to be undone, momentum included.

    Raises:
        NonFiniteError: a term of the loss, or a gradient, is infinite or NaN; says which.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    figures = {name: value.detach().float() for name, value in terms.items()}
    if gradients:
        figures["norm of the gradients"] = torch.stack(torch._foreach_norm(gradients)).float().norm()
    values = torch.stack(list(figures.values()))
    if highest([not bool(values.isfinite().all())])[0]:
        raise NonFiniteError(
            ", ".join(f"{name} {value:g}" for name, value in zip(figures, values.tolist(), strict=True))
        )


def keep_and_end(
    folder: RunFolder,
    state: RunState,
    progress: Progress,
    images: Tensor,
    labels: Tensor,
    paths: list[str],
    reason: str,
) -> NoReturn:
    """Store the batch, and the state as it was before the step, then end the run; all processes take part."""
    settings = json.dumps(asdict(folder.settings))
    batch = pack({"images": images, "labels": labels, "paths": paths, "settings": settings})
    dump = folder.save_nonfinite(state, progress, {f"batch-{state.accelerator.process_index}.pt": batch})
    listing = "\n  ".join(gather_object(paths))
    end_all(
        f"{reason}\nIts images:\n  {listing}\nThe weights are as before it. {dump} has the batch and the whole state, "
        f"to replay the step. Correct the images or the settings, or leave such steps out with --skip-nonfinite "
        f"{folder.settings.skip_nonfinite + 10}",
        1,
    )
