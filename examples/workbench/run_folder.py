"""The folder of a training run: what it was asked for, what it found, and the checkpoints to go on from.

settings.json   what the run was asked for; data.json, what it found. Until there is more than these two, the next
                start may ask for something else
log.csv         a row per epoch; curves.png draws it, tensorboard/ has it for TensorBoard
best/, last/    model folders
state/          the newest checkpoints, for going on after an interruption
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt
from accelerate import PartialState
from safetensors import SafetensorError

from workbench.checkpoint import Checkpoints, RunState, write_bytes
from workbench.datasets import ImageSet
from workbench.distributed import end_all, first_process_first

UNTRAINED = {"settings.json", "data.json", "tensorboard", "state"}  # left by a run that ended before a checkpoint


class RunFolder:
    """The folder of a run, new or begun by the same command; nothing is written before `begin`.

    Args:
        settings: as they go into settings.json.
        changed: of the settings of the run that is there, what differs, a line each.
        keep: how many checkpoints to keep.

    Raises:
        SystemExit: the folder holds a run of other settings or data, or something else.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        changed: Callable[[dict[str, Any]], list[str]],
        data: ImageSet | None = None,
        keep: int = 2,
    ) -> None:
        self.path, self.settings = path, settings
        self.checkpoints = Checkpoints(path / "state", keep)
        self.data = describe(data) if data else {}
        if is_untrained(path):
            return
        if not (path / "settings.json").exists():
            raise SystemExit(f"{path} is no folder of a run and not empty; choose another folder")
        old = json.loads((path / "data.json").read_text()) if (path / "data.json").exists() else self.data
        found = [
            f"{name}: {old.get(name)!r} there, {new!r} here" for name, new in self.data.items() if old.get(name) != new
        ]
        for what, lines in (
            ("of other settings", changed(json.loads((path / "settings.json").read_text()))),
            ("on other data", found),
        ):
            if lines:
                listing = "\n  ".join(lines)
                advice = "Choose another folder, or remove this one."
                raise SystemExit(f"{path} holds a run {what}:\n  {listing}\n{advice}")

    def begin(self) -> None:
        """Make the folder of a run that is about to train: one that fails before that must not leave its settings."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if is_untrained(self.path):
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
                write_text(self.path / "settings.json", json.dumps(self.settings, indent=2))
            if self.data:
                write_text(self.path / "data.json", json.dumps(self.data, indent=2))

    def go_on(self, state: RunState, epochs: int) -> None:
        """Restore the newest checkpoint, if there is one; all processes take part."""
        PartialState().wait_for_everyone()  # others still look whether the folder is free
        with first_process_first():
            if PartialState().is_main_process:
                self.begin()
            newest = self.checkpoints.newest()
            if newest is not None:
                state.load(newest)
                progress = state.progress
                batches = f" and {progress.batch} of {state.sampler.n_batches} batches" if progress.batch else ""
                print(f"going on after epoch {progress.epoch} of {epochs}{batches}", flush=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Ends the run with a message when the disk refuses, for example when it is full."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            names = self.checkpoints.names()
            good = (
                f"The last checkpoint is {self.checkpoints.folder / names[-1]}" if names else "There is no checkpoint"
            )
            way_on = "with this mended, the same command goes on from there"
            raise SystemExit(f"cannot write to {self.path}: {error}\n{good}; {way_on}") from error

    def save(self, state: RunState) -> Path:
        """Store all that the rest of the run depends on; all processes take part."""
        with self.writing():
            return self.checkpoints.save(state)

    @contextmanager
    def replaced(self, name: str) -> Iterator[Path]:
        """A new folder to write into, which takes the place of the folder `name` once it is whole."""
        folder = self.path / name
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def end_stopped(self, state: RunState, signal: int) -> NoReturn:
        """End all processes after a signal, when the state is saved."""
        where = self.checkpoints.folder / state.progress.name
        end_all(f"stopped by signal {signal}, saved as {where}; the same command goes on from there", 128 + signal)

    def write_log(self, history: list[dict[str, float]], columns: list[str]) -> None:
        partial = self.path / "log.csv.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(history)
        partial.replace(self.path / "log.csv")


def is_untrained(path: Path) -> bool:
    """Whether a run may begin in this folder, whatever its settings: it is new, or a run ended there before it trained.

    Checkpoints that are damaged count: they are somebody's work, which a restored disk may bring back.
    """
    if not path.exists():
        return True
    names = {file.name.removesuffix(".partial") for file in path.iterdir()}
    ours = (path / "settings.json").exists() or names <= {"settings.json"}
    return ours and names <= UNTRAINED and not any(file.suffix != ".partial" for file in (path / "state").glob("*"))


def describe(data: ImageSet) -> dict[str, Any]:
    """What tells a data set from another: its counts, and a hash of its images' names and labels in order."""
    # File names that are not UTF-8 count byte by byte.
    lines = [f"{image.path.parent.name}/{image.path.name} {image.label}" for image in [*data.train, *data.test]]
    return {
        "classes": len(data.classes),
        "training images": len(data.train),
        "test images": len(data.test),
        "sha256 of the list": hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest(),
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write_bytes(partial, text.encode())
    os.replace(partial, path)


def draw_curves(history: list[dict[str, float]], file: Path) -> None:
    """Loss terms on the left, accuracy on the right, over epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = {"train_top1": "training", "test_top1": "test top-1", "test_top5": "test top-5"}
    for axes, series in (
        (left, {name: name.replace("_", "-") for name in ("loss", "cross_entropy", "ranking")}),
        (right, lines),
    ):
        for name, label in series.items():
            rows = [row for row in history if name in row]
            axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=label)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100))
    figure.savefig(file, dpi=120)
    plt.close(figure)
