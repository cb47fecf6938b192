"""What `--chunk-size auto` stands for: the chunk size with which a training step fits into the memory there is."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from apinet_head.step_memory import pick_chunk_size
from workbench.run_folder import is_untrained
from workbench.settings import AUTO, Settings

DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def with_chunk_size(settings: Settings, folder: Path, make_net: Callable[[Settings], nn.Module]) -> Settings:
    """The settings with a number for "auto": the one that the run in `folder` began with, if any.

    Of several processes, the first one picks for all.

    Raises:
        SystemExit: no chunk size fits, or this torch can't tell.
    """
    if settings.chunk_size != AUTO:
        return settings
    size = [0]
    if PartialState().is_main_process:
        begun = folder / "settings.json"
        if begun.exists() and not is_untrained(folder):
            size, why = [json.loads(begun.read_text())["chunk_size"]], f"the number with which {folder} began"
        else:
            try:
                size[0], why = estimate(settings, make_net)
            except (ValueError, RuntimeError) as error:
                raise SystemExit(f"--chunk-size auto: {error}") from None
        print(f"--chunk-size auto: {size[0]} ({why})", flush=True)
    broadcast_object_list(size)
    return replace(settings, chunk_size=size[0])


def estimate(settings: Settings, make_net: Callable[[Settings], nn.Module]) -> tuple[int, str]:
    """The chunk size for a step of this process, 0 for the whole batch, and why.

    Raises:
        ValueError: no chunk size fits.
        RuntimeError: this torch can't tell.
    """
    processes = PartialState().num_processes
    choice = pick_chunk_size(
        make_net(replace(settings, chunk_size=0, pretrained=False)),
        settings.n_classes * settings.n_samples // processes,
        settings.crop,
        memory=free_memory(settings.device),
        amp=DTYPES[settings.amp],
        moments=1 if processes == 1 else 2,  # SGD's; many processes also average the gradients in buffers
        loss=None if settings.method == "api" else cross_entropy,
    )
    return choice.chunk_size or 0, str(choice)


def free_memory(device: str) -> int:
    """Bytes for a step of this process: of its GPU, those that are free or its own; else of this machine's memory."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.mem_get_info(rank)[0] + torch.cuda.memory_reserved(rank)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cross_entropy(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The baseline's loss."""
    return F.cross_entropy(net(images), labels)
