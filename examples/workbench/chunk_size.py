"""`--chunk-size auto`: the chunk size with which a training step fits into the available memory."""

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

from apinet_head.step_memory import ChunkChoice, pick_chunk_size
from workbench.distributed import first_process_first
from workbench.run_folder import is_untrained
from workbench.settings import AUTO, Settings

DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def with_chunk_size(settings: Settings, folder: Path, make_net: Callable[[Settings], nn.Module]) -> Settings:
    """The settings with numbers for "auto": those of the run in `folder`, or those that the first process picks."""
    if settings.chunk_size != AUTO:
        return settings
    numbers = [0, 0]
    with first_process_first():
        if PartialState().is_main_process:
            begun = folder / "settings.json"
            if begun.exists() and not is_untrained(folder):
                old, why = json.loads(begun.read_text()), f"the number with which {folder} began"
                numbers = [old["chunk_size"], old["keep_chunks"]]
            else:
                choice = estimate(settings, make_net)
                numbers, why = [choice.chunk_size or 0, choice.keep_chunks], str(choice)
            print(f"--chunk-size auto: {numbers[0]} ({why})", flush=True)
    broadcast_object_list(numbers)
    return replace(settings, chunk_size=numbers[0], keep_chunks=numbers[1])


def estimate(settings: Settings, make_net: Callable[[Settings], nn.Module]) -> ChunkChoice:
    processes = PartialState().num_processes
    try:
        return pick_chunk_size(
            make_net(replace(settings, chunk_size=0, pretrained=False)),
            settings.n_classes * settings.n_samples // processes,
            settings.crop,
            memory=free_memory(settings.device),
            amp=DTYPES[settings.amp],
            moments=1 if processes == 1 else 2,  # SGD's; DDP also has buffers for the gradients
            loss=None if settings.method == "api" else baseline_loss,
        )
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"--chunk-size auto: {error}") from None


def free_memory(device: str) -> int:
    """Bytes for a step of this process: what its GPU has free or reserved, else its share of the machine's memory."""
    if device in ("auto", "cuda") and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.cuda.mem_get_info(rank)[0] + torch.cuda.memory_reserved(rank)
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def baseline_loss(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images), labels)
