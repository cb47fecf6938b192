"""Checkpoints: all that the rest of a run depends on, written atomically; the last few are kept.

Not accelerate's save_state: it stores random states as pickles, silently skips them if they can't be loaded, and does
not store the position in the epoch.
"""

import io
import os
import pickle
import shutil
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

# What torch.load raises for damaged and foreign files; for a pickle that would run code, UnpicklingError.
BROKEN = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError)
BROKEN += (pickle.UnpicklingError, zipfile.BadZipFile)


@dataclass
class Progress:
    """How far a run is."""

    epoch: int = 0  # that were finished
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)  # a row of figures for each epoch
    batch: int = 0  # done of the epoch that has begun
    counted: int = 0  # of these, the ones in its figures
    seconds: float = 0.0  # that it took so far
    skipped: int = 0  # steps left out, as they were not finite

    @property
    def name(self) -> str:
        """Of a checkpoint; names sort as the run goes."""
        return f"epoch-{self.epoch:04d}" + (f"-batch-{self.batch:05d}" if self.batch else "")


@dataclass
class RunState:
    """The state of a run. Images need no random state: each crop is seeded on its own."""

    accelerator: Accelerator
    net: torch.nn.Module
    optimizer: Any
    scheduler: Any
    sampler: Any
    progress: Progress = field(default_factory=Progress)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the begun epoch's figures

    def count(self, figures: dict[str, Tensor]) -> None:
        """Add those of a step to the epoch's."""
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.progress.counted += 1

    def files(self) -> dict[str, Any]:
        """This process's files of a checkpoint: what is its own, and from the first one, what is the same on all."""
        process = PartialState()
        random = {name: source.get_rng_state() for name, source in self._generators().items()}
        files: dict[str, Any] = {f"process-{process.process_index}.pt": {"random": random, "sums": self.sums}}
        if process.is_main_process:
            shared = {name: part.state_dict() for name, part in self._parts().items()}
            shared |= {"sampler": self.sampler.state_dict(self.progress.batch), "progress": asdict(self.progress)}
            files["state.pt"] = shared | {"processes": process.num_processes}
        return files

    def load(self, checkpoint: Path) -> None:
        """Restore all, by as many processes as saved it."""
        process, shared = PartialState(), load(checkpoint / "state.pt")
        saved, here = shared["processes"], process.num_processes
        if saved != here:
            advice = f"resume with `torchrun --nproc_per_node={saved}`, or choose another folder"
            raise SystemExit(f"{checkpoint.parents[1]} holds a run of {saved} process(es), this is {here}: {advice}")
        own = load(checkpoint / f"process-{process.process_index}.pt")
        for name, part in self._parts().items():
            part.load_state_dict(shared[name])
        self.sampler.load_state_dict(shared["sampler"])
        self.progress = Progress(**shared["progress"])
        self.sums = {name: value.to(self.accelerator.device) for name, value in own["sums"].items()}
        for name, source in self._generators().items():
            source.set_rng_state(own["random"][name])

    def _parts(self) -> dict[str, Any]:
        parts = {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return parts | ({"scaler": self.accelerator.scaler} if self.accelerator.scaler else {})

    def _generators(self) -> dict[str, Any]:
        """The modules that have this process's random states."""
        device = self.accelerator.device.type
        return {"cpu": torch} | ({} if device == "cpu" else {device: getattr(torch, device)})


@dataclass
class Checkpoints:
    """The checkpoints of a folder, of which the newest `keep` are kept; their names sort by age."""

    folder: Path
    keep: int

    def names(self) -> list[str]:
        """From the oldest to the newest, without those that were set aside."""
        return sorted(path.name for path in self.folder.glob("epoch-*") if not path.suffix)

    def save(self, state: RunState) -> None:
        """Write a checkpoint, by all processes; it gets its name once all is on the disk. OSError if that is full."""
        process = PartialState()
        target = self.folder / state.progress.name
        partial = target.with_name(f"{target.name}.partial")
        try:
            if process.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            process.wait_for_everyone()
            for file, content in state.files().items():
                torch.save(content, buffer := io.BytesIO())  # on a full disk, it would raise RuntimeError itself
                write_bytes(partial / file, buffer.getvalue())
            process.wait_for_everyone()
            if process.is_main_process:
                sync_folder(partial)
                partial.replace(target)
                sync_folder(self.folder)
                for path in self.folder.iterdir():
                    if path.name not in self.names()[-self.keep :]:
                        shutil.rmtree(path)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # it takes space on a full disk
            raise
        process.wait_for_everyone()

    def newest(self) -> Path | None:
        """The newest that loads, None if there are none; damaged ones are reported and renamed."""
        broken = []
        for name in reversed(self.names()):
            checkpoint = self.folder / name
            try:
                for rank in range(load(checkpoint / "state.pt")["processes"]):
                    load(checkpoint / f"process-{rank}.pt")
            except BROKEN as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"the checkpoint {checkpoint} cannot be loaded: {reason}", flush=True)
                broken.append(checkpoint)
                continue
            for path in broken:  # so that they don't count as ones to keep
                shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
                path.replace(path.with_suffix(".damaged"))
            return checkpoint
        if broken:
            raise SystemExit(f"no checkpoint in {self.folder} can be loaded: restore one, or remove the folder")
        return None


def load(path: Path) -> Any:
    """Load tensors and plain values; a file that is damaged, or holds anything that could run code, is refused."""
    with zipfile.ZipFile(path) as archive:  # it has a CRC of each tensor, which torch.load ignores
        if (name := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{name} in {path.name} is not what was written")
    return torch.load(path, map_location="cpu", weights_only=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:  # the file names too must be on the disk
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
