"""The folder of a training run: settings, log, curves, model folders, and the state to go on from.

settings.json   what the run was asked for
log.csv         a row per epoch; curves.png draws it, tensorboard/ has it for TensorBoard
best/, last/    model.safetensors, config.json (APINet.from_pretrained) and run.json (classes, image sizes)
state/          all of the newest epoch's state, for going on after an interruption
"""

import csv
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils.constants import RNG_STATE_NAME
from settings import Settings, differences

from apinet_head import APINet

COLUMNS = ["epoch", "step", "lr", "seconds", "loss", "cross_entropy", "ranking", "train_top1", "test_top1", "test_top5"]


@dataclass
class Progress:
    """How far a run is: epochs and steps done, and a row of figures for each epoch."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        return max((row["test_top1"] for row in self.history if "test_top1" in row), default=-1.0)


class RunFolder:
    """Opens the folder of a run, new or begun by the same command.

    Raises:
        FileExistsError: the folder holds a run of other settings, or something else.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        file = path / "settings.json"
        if file.exists():
            changed = differences(json.loads(file.read_text()), settings)
            if changed:
                listing = "\n  ".join(changed)
                advice = "Choose another --output, or remove the folder."
                raise FileExistsError(f"{path} holds a run of other settings:\n  {listing}\n{advice}")
        elif path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} is no folder of a run and not empty; choose another --output")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(asdict(settings), indent=2))

    def save_state(self, accelerator: Accelerator, progress: Progress) -> None:
        """Store all that the next epoch depends on; the epoch before's is removed only when that is done.

        All processes take part: each has a random state of its own.
        """
        target = self.path / "state" / f"epoch-{progress.epoch:04d}"
        partial = target.with_suffix(".partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            return
        write_text(partial / "progress.json", json.dumps(asdict(progress)))
        partial.replace(target)
        for old in self.path.glob("state/*"):
            if old != target:
                shutil.rmtree(old)

    def load_state(self, accelerator: Accelerator) -> Progress:
        """Restore the newest state there is; a fresh Progress if there is none.

        Raises:
            SystemExit: another number of processes saved it.
        """
        states = sorted(path for path in self.path.glob("state/epoch-*") if path.suffix != ".partial")
        if not states:
            return Progress()
        saved, here = len(list(states[-1].glob(f"{RNG_STATE_NAME}_*.pkl"))), accelerator.num_processes
        if saved != here:  # the missing random states would be passed over in silence
            raise SystemExit(
                f"{self.path} holds a run of {saved} process(es), and here are {here}: go on with "
                f"`torchrun --nproc_per_node={saved}`, or choose another --output"
            )
        accelerator.load_state(str(states[-1]))
        return Progress(**json.loads((states[-1] / "progress.json").read_text()))

    def save_model(self, name: str, net: APINet, settings: Settings, classes: list[str], row: dict[str, float]) -> None:
        """Store the net as a folder of its own, which evaluate.py and APINet.from_pretrained load."""
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


def load_model(folder: Path) -> tuple[APINet, dict[str, Any]]:
    """The net of a model folder, in eval mode, and its run.json."""
    run = folder / "run.json"
    if not run.exists():
        raise FileNotFoundError(f"{folder} is no model folder of train.py (it has no run.json), such as RUN/best")
    return APINet.from_pretrained(folder), json.loads(run.read_text())


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
