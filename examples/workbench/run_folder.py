"""The folder of a training run: its settings, results and checkpoints.

settings.json   the settings, and a fingerprint of the data
log.csv         a row per epoch; tensorboard/ has it for TensorBoard
best/, last/    model folders
state/          the newest checkpoints, to resume from
lock            locked by the process that trains here
"""

import csv
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from accelerate import PartialState
from safetensors import SafetensorError

from workbench.checkpoint import Checkpoints, RunState, write_bytes
from workbench.datasets import ImageSet
from workbench.distributed import end_all, first_process_first, highest
from workbench.settings import differences

UNTRAINED = {"settings.json", "tensorboard", "state", "lock"}  # left by a run that ended before a checkpoint


class RunFolder:
    """The folder of a run, new or begun by the same command; nothing is written before `begin`.

    `settings` go into settings.json. A run may be resumed with other values of the `harmless` ones.
    """

    def __init__(self, path: Path, settings: dict[str, Any], harmless: Collection[str] = (), keep: int = 2) -> None:
        self.path, self.settings, self._saved = path, settings, time.monotonic()
        self.checkpoints = Checkpoints(path / "state", keep)
        if is_untrained(path):
            return
        if not (path / "settings.json").exists():
            raise SystemExit(f"{path} is not empty and not the folder of a run; choose another one")
        old = json.loads((path / "settings.json").read_text())
        if found := differences(old, settings, harmless):
            listing = "\n  ".join(found)
            raise SystemExit(f"{path} holds another run:\n  {listing}\nChoose another folder, or remove this one.")

    def begin(self) -> None:
        """Create the folder just before training: a run that fails earlier must not leave its settings behind."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
            if is_untrained(self.path):
                shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
                write_text(self.path / "settings.json", json.dumps(self.settings, indent=2))

    def go_on(self, state: RunState, epochs: int) -> None:
        """Restore the newest checkpoint, if there is one; all processes take part."""
        PartialState().wait_for_everyone()  # others may still be checking the folder
        with first_process_first():
            if PartialState().is_main_process:
                self.begin()
            newest = self.checkpoints.newest()
            if newest is not None:
                state.load(newest)
                progress = state.progress
                batches = f" and {progress.batch} of {state.sampler.n_batches} batches" if progress.batch else ""
                print(f"resuming after epoch {progress.epoch} of {epochs}{batches}", flush=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Ends the run with a message when writing fails, for example because the disk is full."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            good = "There is no checkpoint"
            if names := self.checkpoints.names():
                good = f"The last checkpoint is {self.checkpoints.folder / names[-1]}"
            way_on = "once this is fixed, the same command resumes from there"
            raise SystemExit(f"cannot write to {self.path}: {error}\n{good}; {way_on}") from error

    def save(self, state: RunState, signal: int, minutes: float) -> None:
        """For all processes: save after an epoch, and every so many minutes in it; save and end after a signal."""
        batch = state.progress.batch
        late = 0 < 60 * minutes < time.monotonic() - self._saved and batch < state.sampler.n_batches
        stop, due = highest([signal, not batch or late])
        if stop or due:
            with self.writing():
                self.checkpoints.save(state)
            self._saved = time.monotonic()
        if stop:
            where = self.checkpoints.folder / state.progress.name
            said = f"stopped by signal {stop:.0f}, saved as {where}; the same command resumes from there"
            end_all(said, 128 + int(stop))

    @contextmanager
    def replaced(self, name: str) -> Iterator[Path]:
        """A new folder to write into, which replaces the folder `name` once it is complete."""
        folder = self.path / name
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)

    def write_log(self, history: list[dict[str, float]], columns: list[str]) -> None:
        partial = self.path / "log.csv.partial"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(history)
        partial.replace(self.path / "log.csv")


def lock(path: Path) -> IO[str]:
    """An open, locked file that keeps other processes from training in this folder until this process ends."""
    file = (path / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which worker processes would inherit
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"another training is writing into {path}: choose another folder, or wait") from None
    except OSError:
        pass  # a file system without locks
    return file


def is_untrained(path: Path) -> bool:
    """Whether a run with any settings may begin here: the folder is new, or its run ended before it trained.

    Damaged checkpoints count as training: they may be restored from a backup.
    """
    if not path.exists():
        return True
    names = {file.name.removesuffix(".partial") for file in path.iterdir()}
    ours = (path / "settings.json").exists() or names <= {"settings.json", "lock"}
    return ours and names <= UNTRAINED and not any(file.suffix != ".partial" for file in (path / "state").glob("*"))


def describe(data: ImageSet) -> dict[str, Any]:
    """A fingerprint of a data set: its counts, and a hash of its images' names and labels in order."""
    lines = [f"{image.path.parent.name}/{image.path.name} {image.label}" for image in [*data.train, *data.test]]
    sha = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()  # names need not be UTF-8
    return {"training images": len(data.train), "test images": len(data.test), "sha256 of their list": sha}


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_name(path.name + ".partial")
    write_bytes(partial, text.encode())
    os.replace(partial, path)
