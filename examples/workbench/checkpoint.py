"""Checkpoints on disk: whole or not there at all, with checksums, the last few kept.

The checksums find what accidents do: a truncated file, a bad disk, half a copy. Against malice they are no help, for
who alters a file can alter its checksum; so nothing is loaded here that could run code (`weights_only=True`).
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of a folder; their names sort by age.

    Args:
        folder: made with the first checkpoint.
        keep: how many to keep, the newest.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def names(self) -> list[str]:
        """From the oldest to the newest, damaged ones included."""
        return sorted(path.name for path in self.folder.glob("epoch-*") if not path.suffix)

    def save(self, name: str, files: dict[str, bytes]) -> Path:
        """Write a checkpoint; it has its name only when all of it is on the disk. Older ones are removed after that.

        All processes take part, each with files of its own, and leave when it is done.

        Raises:
            OSError: the disk is full, for example; the checkpoints before are as they were.
        """
        process = PartialState()
        target, partial = self.folder / name, self.folder / f"{name}.partial"
        try:
            if process.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            process.wait_for_everyone()
            for file, content in files.items():
                write_bytes(partial / file, content)
            process.wait_for_everyone()
            if process.is_main_process:
                digests = {path.name: digest(path) for path in sorted(partial.iterdir())}
                write_bytes(partial / MANIFEST, json.dumps(digests, indent=2).encode())
                sync_folder(partial)
                partial.replace(target)
                sync_folder(self.folder)
                self._remove_old()
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # on a full disk, there is no use for half of it
            raise
        process.wait_for_everyone()
        return target

    def newest(self) -> Path | None:
        """The newest that is as it was written, None if there is none at all; a damaged one is told of and set aside.

        Raises:
            SystemExit: all are damaged.
        """
        damaged = []
        for name in reversed(self.names()):
            wrong = damage(self.folder / name)
            if wrong is None:
                for bad in damaged:  # out of the way of new ones, and of counting as one to keep
                    shutil.rmtree(bad.with_suffix(".damaged"), ignore_errors=True)
                    bad.replace(bad.with_suffix(".damaged"))
                return self.folder / name
            print(f"the checkpoint {self.folder / name} is damaged: {wrong}; looking for the one before", flush=True)
            damaged.append(self.folder / name)
        if damaged:
            raise SystemExit(
                f"no whole checkpoint is left in {self.folder}: restore one, or remove the folder to start from nothing"
            )
        return None

    def _remove_old(self) -> None:
        kept = self.names()[-self.keep :]
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path)


def damage(checkpoint: Path) -> str | None:
    """What differs from what was written, None if nothing does."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in digests.items():
        if not (checkpoint / name).exists():
            return f"{name} is missing"
        if digest(checkpoint / name) != expected:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def pack(state: Any) -> bytes:
    # By way of memory: torch.save makes RuntimeErrors of a full disk, and a short file must not pass for a whole one.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack(path: Path) -> Any:
    """What `pack` made of tensors and plain types.

    Raises:
        SystemExit: the file has more in it, which could run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SystemExit(
            f"{path} is refused, and nothing in it was run: it has more in it than the tensors and plain values that "
            f"a run writes. Find out where it comes from; remove {path.parent} to go on from the checkpoint before"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in the folder too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
