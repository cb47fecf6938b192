"""Runs the cases of a test file on several processes at once, joined by torch.distributed with gloo."""

import gc
import multiprocessing
import os
import runpy
import socket
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW_IMPORTS = ["pytest", "timm", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.testing"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def on_ranks(world: int, file: str, folder: Path) -> list[dict[str, str]]:
    """Of every one of `world` ranks, the tracebacks of what failed there of that file's `CASES[world]`, by name.

    The cases are functions that compare what the ranks found; all run in the same processes, because these take longer
    to begin than most of the cases.
    """
    # Ranks are forks of one process that has imported what takes long, and has started no thread.
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    mp.start_processes(_run, (world, free_port(), file, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def from_all(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The values of all ranks of the group, on each of them."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group)
    return found


def _run(rank: int, world: int, port: int, file: str, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    failed = {}
    for name, case in runpy.run_path(file)["CASES"][world].items():
        try:
            case()
        except BaseException:  # as of pytest.fail, too
            failed[name] = traceback.format_exc()
    torch.save(failed, folder / f"{rank}.pt")
    # What holds on to the group (DistributedDataParallel's reducers, in reference cycles) goes before it, and no rank
    # closes its connections while another still uses them: either could abort a process at its end.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
