"""Runs the cases of a test file on several processes at once, joined by torch.distributed with gloo."""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from contextlib import redirect_stdout
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
    _start(_run, world, file, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


def script_on_ranks(world: int, script: Path, folder: Path, *arguments: str) -> list[str]:
    """What each of `world` ranks printed that ran the script in that folder, with torchrun's variables, on CPUs."""
    _start(_run_script, world, str(script), folder, arguments)
    return [(folder / f"printed-{rank}.txt").read_text() for rank in range(world)]


def _start(function: Any, world: int, *arguments: Any) -> None:
    # Ranks are forks of one process that has imported what takes long, and has started no thread.
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    mp.start_processes(function, (world, free_port(), *arguments), nprocs=world, start_method="forkserver")


def _run_script(rank: int, world: int, port: int, script: str, folder: Path, arguments: tuple[str, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    with (folder / f"printed-{rank}.txt").open("w") as printed, redirect_stdout(printed):
        runpy.run_path(script, run_name="__main__")


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
