"""The folder of a training run: settings, log, curves, model folders, and the checkpoints to go on from.

settings.json   what the run was asked for; data.json, what it found at --data. Until there is more than these two, the
                next start may ask for something else
log.csv         a row per epoch; curves.png draws it, tensorboard/ has it for TensorBoard
best/, last/    model.safetensors, config.json (APINet.from_pretrained) and run.json (classes, image sizes)
state/          the newest checkpoints, for going on after an interruption
nonfinite/      what is needed to replay a step that was not finite, if there was one
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from apinet_head import APINet
from workbench.checkpoint import Checkpoints, write_bytes
from workbench.images import ImageSet
from workbench.run_state import RunState
from workbench.settings import Settings, differences

# What a run leaves that ended before its first checkpoint. A step that was not finite has its own settings with it.
UNTRAINED = {"settings.json", "data.json", "tensorboard", "state", "nonfinite"}
COLUMNS = ["epoch", "step", "lr", "seconds", "loss", "cross_entropy", "ranking", "train_top1", "test_top1", "test_top5"]
COLUMNS += ["skipped", "left_out"]


@dataclass
class Progress:
    """How far a run is: epochs and steps done, and a row of figures for each epoch.

    Attributes:
        batch: batches done of the epoch that has begun, of which `counted` are in its figures; it took `seconds`.
        skipped: steps left out, for they were not finite.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    batch: int = 0
    counted: int = 0
    seconds: float = 0.0
    skipped: int = 0

    @property
    def best(self) -> float:
        return max((row["test_top1"] for row in self.history if "test_top1" in row), default=-1.0)

    @property
    def name(self) -> str:
        """Of a checkpoint; names sort as the run goes."""
        return f"epoch-{self.epoch:04d}" + (f"-batch-{self.batch:05d}" if self.batch else "")


class RunFolder:
    """The folder of a run, new or begun by the same command; nothing is written before `begin`.

    Raises:
        FileExistsError: the folder holds a run of other settings or data, or something else.
    """

    def __init__(self, path: Path, settings: Settings, data: ImageSet | None = None) -> None:
        self.path, self.settings = path, settings
        self.checkpoints = Checkpoints(path / "state", settings.keep_checkpoints)
        self.data = describe(data) if data else {}
        advice = "Choose another --output, or remove the folder."
        if is_untrained(path):
            return
        if (path / "settings.json").exists():
            changed = differences(json.loads((path / "settings.json").read_text()), settings)
            if changed:
                listing = "\n  ".join(changed)
                raise FileExistsError(f"{path} holds a run of other settings:\n  {listing}\n{advice}")
        else:
            raise FileExistsError(f"{path} is no folder of a run and not empty; choose another --output")
        if self.data and (path / "data.json").exists():
            old = json.loads((path / "data.json").read_text())
            changed = [
                f"{name}: {old.get(name)!r} there, {new!r} here"
                for name, new in self.data.items()
                if old.get(name) != new
            ]
            if changed:
                listing = "\n  ".join(changed)
                raise FileExistsError(f"{path} holds a run on other data:\n  {listing}\n{advice}")

    def begin(self) -> None:
        """Make the folder of a run that is about to train: one that fails before that must not leave its settings."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if is_untrained(self.path):
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
                write_text(self.path / "settings.json", json.dumps(asdict(self.settings), indent=2))
            if self.data:
                write_text(self.path / "data.json", json.dumps(self.data, indent=2))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Ends the run with a message when the disk refuses, for example when it is full."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise SystemExit(f"cannot write to {self.path}: {error}\n{self.way_on()}") from error

    def way_on(self) -> str:
        """For messages that end a run: where it would go on."""
        names = self.checkpoints.names()
        good = f"The last checkpoint is {self.checkpoints.folder / names[-1]}" if names else "There is no checkpoint"
        return f"{good}; with this mended, the same command goes on from there"

    def save_state(self, state: RunState, progress: Progress, sums: dict[str, Tensor]) -> Path:
        """Store all that the rest of the run depends on; all processes take part."""
        with self.writing():
            return self.checkpoints.save(progress.name, state_files(state, progress, sums))

    def load_state(self, state: RunState) -> tuple[Progress, dict[str, Tensor]]:
        """Restore the newest state there is, and the sums of its epoch's figures; a fresh Progress if there is none.

        Raises:
            SystemExit: another number of processes saved it, or all that were saved are damaged.
        """
        newest = self.checkpoints.newest()
        if newest is None:
            return Progress(), {}
        sums = state.load(newest)
        return Progress(**json.loads((newest / "progress.json").read_text())), sums

    def save_nonfinite(self, state: RunState, progress: Progress, files: dict[str, bytes]) -> Path:
        """Store a state with the batch that it fails on, beside the checkpoints; all processes take part."""
        dumps = Checkpoints(self.path / "nonfinite", keep=1)
        with self.writing():
            return dumps.save(progress.name, state_files(state, progress, {}) | files)

    def save_model(self, name: str, net: APINet, settings: Settings, classes: list[str], row: dict[str, float]) -> None:
        """Store the net as a folder of its own, which score.py and APINet.from_pretrained load."""
        folder = self.path / name
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        net.save_pretrained(partial)
        run = {"classes": classes, "metrics": row, "settings": asdict(settings)}
        write_text(partial / "run.json", json.dumps(run, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def write_result(self, result: dict[str, Any]) -> None:
        write_text(self.path / "result.json", json.dumps(result, indent=2))

    def write_log(self, history: list[dict[str, float]]) -> None:
        partial = self.path / "log.csv.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
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


def state_files(state: RunState, progress: Progress, sums: dict[str, Tensor]) -> dict[str, bytes]:
    files = state.files(progress.batch, sums)
    if state.accelerator.is_main_process:
        files["progress.json"] = json.dumps(asdict(progress)).encode()
    return files


def load_model(folder: Path) -> tuple[APINet, dict[str, Any]]:
    """The net of a model folder, in eval mode, and its run.json."""
    run = folder / "run.json"
    if not run.exists():
        raise FileNotFoundError(f"{folder} is no model folder of train_cub.py (it has no run.json), such as RUN/best")
    return APINet.from_pretrained(folder), json.loads(run.read_text())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write_bytes(partial, text.encode())
    os.replace(partial, path)
