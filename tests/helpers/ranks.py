"""Runs functions on several processes at once, joined by torch.distributed with gloo."""

import gc
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seen after training, where the last reference to DistributedDataParallel goes.
under_torchrun = pytest.mark.skipif(torch.__version__ < "2.6", reason="gloo of torch 2.5 can hang where a process ends")


def on_ranks(world: int, cases: Mapping[str, Callable[[], Any]], folder: Path) -> list[dict[str, Any]]:
    """What each case returns, by its name, on every one of `world` ranks; its traceback if it raised.

    The cases must be importable, for each rank is a new process. All run in the same processes, because importing torch
    takes longer than most of them.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_run, (world, port, dict(cases), folder), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _run(rank: int, world: int, port: int, cases: dict[str, Callable[[], Any]], folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, folder / f"{rank}.pt")
    # What holds on to the group (DistributedDataParallel's reducers, in reference cycles) goes before it, and no rank
    # closes its connections while another still uses them: either could abort a process at its end.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
