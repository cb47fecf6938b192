"""Runs a script on several processes at once, as torchrun does."""

import multiprocessing
import os
import runpy
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.multiprocessing as mp

SLOW_IMPORTS = ["pytest", "timm", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.testing"]


def script_on_ranks(world: int, script: Path, folder: Path, *arguments: str) -> list[str]:
    """What each of `world` ranks printed that ran the script in that folder, with torchrun's variables, on CPUs."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # Ranks are forks of one process that has imported what takes long, and has started no thread.
    multiprocessing.set_forkserver_preload(SLOW_IMPORTS)
    mp.start_processes(_run, (world, port, str(script), folder, arguments), nprocs=world, start_method="forkserver")
    return [(folder / f"printed-{rank}.txt").read_text() for rank in range(world)]


def _run(rank: int, world: int, port: int, script: str, folder: Path, arguments: tuple[str, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    with (folder / f"printed-{rank}.txt").open("w") as printed, redirect_stdout(printed):
        runpy.run_path(script, run_name="__main__")
