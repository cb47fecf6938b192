"""Runs train_cub.py many times, several at a time, and collects the results; finished runs are not run again."""

import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from tqdm import tqdm

from workbench.datasets import ImageSet
from workbench.run_folder import RunFolder
from workbench.settings import HARMLESS, Settings, parse


class Job(NamedTuple):
    """One run of train_cub.py: the name of its folder, and its flags."""

    name: str
    flags: list[str]


def run_jobs(folder: Path, jobs: Sequence[Job], parallel: int) -> dict[str, dict[str, Any]]:
    """Run all jobs, `parallel` at a time, under one progress bar over their epochs; the results by name.

    Each run has its folder below `folder`, and a log beside it.

    Raises:
        SystemExit: a run failed (its output is the message), or a folder holds a run of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {job.name: parse([*job.flags, "--output", str(folder / job.name)]) for job in jobs}
    waiting = [job for job in jobs if not _is_finished(folder / job.name, settings[job.name])]
    running: dict[str, subprocess.Popen[bytes]] = {}
    bar = tqdm(total=sum(one.epochs for one in settings.values()), desc="training", unit="epoch")
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job.name] = _start(folder, job)
            time.sleep(0.5)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise SystemExit(f"{name} failed:\n{_log_of(folder, name).read_text()[-3000:]}")
            bar.update(sum(len(read_log(folder / job.name)) for job in jobs) - bar.n)
    finally:
        for process in running.values():
            process.terminate()
        bar.close()
    return {job.name: json.loads((folder / job.name / "result.json").read_text()) for job in jobs}


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv, none if it has not got that far."""
    file = path / "log.csv"
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """ "mean ± standard deviation", or the one value there is."""
    if digits is None:
        digits = 2 if max(map(abs, values)) < 10 else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def origin(data: ImageSet, settings: Settings, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Where a table's figures come from: date, data, budget, machine, versions."""
    runs = [run for of_name in results.values() for run in of_name]
    seeds = max(map(len, results.values()))
    return (
        f"{date.today()}: {data.name}, {len(data.classes)} classes, {len(data.train)} training and {len(data.test)} "
        f"test images; {settings.backbone} {settings.backbone_args}, {settings.crop} x {settings.crop} pixels, "
        f"{settings.epochs} epochs, {seeds} seeds, {len(runs)} runs, {sum(run['seconds'] for run in runs) / 60:.0f} "
        f"minutes of training in all; {platform.machine()} CPU with {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}. "
        "Mean ± standard deviation over the seeds; differences are taken seed by seed."
    )


def _is_finished(path: Path, settings: Settings) -> bool:
    RunFolder(path, asdict(settings), HARMLESS)  # ends here if it is another run's
    return (path / "result.json").exists()


def _start(folder: Path, job: Job) -> "subprocess.Popen[bytes]":
    command = [sys.executable, str(Path(__file__).parents[1] / "train_cub.py"), *job.flags]
    command += ["--output", str(folder / job.name)]
    with _log_of(folder, job.name).open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def _log_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.log"
