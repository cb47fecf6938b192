"""Runs train_cub.py many times, several runs in parallel, and collects the results; finished runs are kept."""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from workbench import Command, number, writing
from workbench.datasets import ImageSet
from workbench.guard import check_device
from workbench.run_folder import RunFolder
from workbench.settings import HARMLESS, Settings, parse
from workbench.tables import machine

Results = dict[str, list[dict[str, Any]]]  # by the name of a variant, a result per seed


def make_parser(about: str | None, seeds: int, folder: str) -> Command:
    """The flags of all sweeps; further ones are passed to train_cub.py."""
    parser = Command(about, epilog="Further flags go to train_cub.py, such as --data.")
    add, jobs = parser.add_argument, os.cpu_count() or 1
    add("--seeds", type=number(int, 1), default=seeds, help="runs of each")
    add("--jobs", type=number(int, 1), default=jobs, help="runs at a time")
    add("--runs", type=Path, default=Path(folder), help="folder of the runs")
    add("--output", type=Path, help="folder for the results (default: that of the runs)")
    return parser


def run_all(options: argparse.Namespace, variants: Mapping[str, Sequence[str]], flags: list[str]) -> Results:
    """Train each variant with its flags, for each seed, `options.jobs` at a time; finished runs are kept."""
    # Seed by seed, so that an interrupted sweep has something of every variant.
    jobs = {
        f"{name}-seed{seed}": [*flags, *own, "--seed", str(seed), "--output", str(options.runs / f"{name}-seed{seed}")]
        for seed in range(options.seeds)
        for name, own in variants.items()
    }
    for flag, folder in (("--runs", options.runs), ("--output", options.output or options.runs)):
        with writing(flag, folder):  # hours before the results are
            folder.mkdir(parents=True, exist_ok=True)
    settings = {name: parse(job) for name, job in jobs.items()}
    for name, one in settings.items():
        RunFolder(options.runs / name, asdict(one), HARMLESS)  # raises if the folder holds another run
    waiting = [name for name in jobs if not (options.runs / name / "result.json").exists()]
    running: dict[str, subprocess.Popen[bytes]] = {}
    bar = tqdm(total=sum(one.epochs for one in settings.values()), desc="training", unit="epoch")
    try:
        while waiting or running:
            while waiting and len(running) < options.jobs:
                name = waiting.pop(0)
                running[name] = _start(jobs[name], options.runs / f"{name}.log")
            time.sleep(0.5)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        raise SystemExit(f"{name} failed:\n{(options.runs / f'{name}.log').read_text()[-3000:]}")
            bar.update(sum(len(read_log(options.runs / name)) for name in jobs) - bar.n)
    finally:
        for process in running.values():
            process.terminate()
        bar.close()
    found = {name: json.loads((options.runs / name / "result.json").read_text()) for name in jobs}
    return {name: [found[f"{name}-seed{seed}"] for seed in range(options.seeds)] for name in variants}


def read_log(path: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv, none if there is no log yet."""
    file = path / "log.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def origin(data: ImageSet, settings: Settings, results: Results) -> str:
    """Where a table's figures come from: data, budget, machine, versions, date."""
    runs = [run for of_name in results.values() for run in of_name]
    seeds = max(map(len, results.values()))
    return (
        f"{data.name}, {len(data.classes)} classes, {len(data.train)} training and {len(data.test)} "
        f"test images; {settings.backbone} {settings.backbone_args}, {settings.crop} x {settings.crop} pixels, "
        f"{settings.epochs} epochs, {seeds} seeds, {len(runs)} runs, {sum(run['seconds'] for run in runs) / 60:.0f} "
        "minutes of training in all, mean ± standard deviation over the seeds; differences are taken seed by seed. "
        f"{machine(str(check_device(settings.device)), settings.threads)}."
    )


def _start(flags: list[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as opened:
        command = [sys.executable, str(Path(__file__).parents[1] / "train_cub.py"), *flags]
        return subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT)
