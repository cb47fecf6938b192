"""What a training run survives: kills at any moment, damaged checkpoints, full disks, signals."""

import errno
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from cub_runs import FULL, TINY, KilledError, assert_ends_alike, at_call, killed, run

import train_cub
from workbench import checkpoint, run_folder
from workbench.datasets import open_data
from workbench.images import ImageDataset, train_loader, train_transform
from workbench.run_folder import RunFolder
from workbench.settings import parse


@pytest.fixture(scope="module")
def whole(birds, tmp_path_factory):
    """A run never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(birds, folder, *FULL)
    return folder


class Kill:
    """Raises KilledError at the n-th of the moments that change a run or its folder; the file of that moment is cut."""

    def __init__(self, patch, moment=None):
        self.moment, self.passed = moment, []
        write = checkpoint.write_bytes

        def cut(path, content):
            if self.is_now("write"):
                path.write_bytes(content[: len(content) // 2])
                raise KilledError
            write(path, content)

        patch.setattr(checkpoint, "write_bytes", cut)
        patch.setattr(run_folder, "write_bytes", cut)
        places = [(Path, "replace"), (Path, "mkdir"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"),
                  (train_cub, "compute_loss"), (train_cub, "nonfinite"), (train_cub, "record"),
                  (train_cub, "save_model"), (train_cub, "predict"), (RunFolder, "write_log")]  # fmt: skip
        for owner, name in places:
            patch.setattr(owner, name, self._before(name, getattr(owner, name)))

    def is_now(self, name):
        self.passed.append(name)
        return len(self.passed) - 1 == self.moment

    def after(self, moments):
        """Set the moment: so many after the next one."""
        self.moment = len(self.passed) + 1 + moments

    def _before(self, name, function):
        def killed_before(*args, **kwargs):
            if self.is_now(name):
                raise KilledError
            return function(*args, **kwargs)

        return killed_before


def test_killed_at_any_moment_a_run_ends_as_if_never_killed(birds, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        moments = Kill(patch)
        run(birds, tmp_path / "count", *FULL)
    assert {"write", "replace", "fsync", "rmtree", "compute_loss", "record"} <= set(moments.passed)
    rng, kills = random.Random(0), []
    # The first start, the first checkpoint, and then anywhere; each run is killed again and again until it is done.
    for first in (2, 14, 40):
        folder = tmp_path / f"run-{first}"
        moment = first
        while True:
            # Nothing may depend on what the new process happens to have.
            torch.manual_seed(rng.randrange(1000))
            random.seed(rng.randrange(1000))
            np.random.seed(rng.randrange(1000))
            with monkeypatch.context() as patch:
                kill = Kill(patch, moment)
                try:
                    run(birds, folder, *FULL)
                    break
                except KilledError:
                    kills.append(kill.passed[-1])
            moment = rng.randrange(16, 44)
        assert_ends_alike(folder, whole)
    assert len(kills) >= 15, kills


@pytest.mark.parametrize("moment", range(8))
def test_killed_while_a_checkpoint_is_written(birds, tmp_path, whole, monkeypatch, moment):
    """Each moment between the third step and the fourth."""
    with monkeypatch.context() as patch:
        kill = Kill(patch)
        at_call(patch, 4, train_cub, "compute_loss", lambda: kill.after(moment))
        with pytest.raises(KilledError):
            run(birds, tmp_path / "run", *FULL)
    run(birds, tmp_path / "run", *FULL)
    assert_ends_alike(tmp_path / "run", whole)


def test_workers_change_nothing_also_when_the_run_goes_on(birds, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, 5, train_cub, "compute_loss", killed)
        with pytest.raises(KilledError):
            run(birds, tmp_path / "run", *FULL, "--workers", "2")
    run(birds, tmp_path / "run", *FULL, "--workers", "2")
    assert_ends_alike(tmp_path / "run", whole)


def test_crops_depend_on_place_and_epoch(birds):
    settings = parse([*TINY, "--data", str(birds)])
    data = open_data(settings)
    sampler = train_cub.make_sampler(settings, data)
    config = {"squash": 40, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    loader = train_loader(ImageDataset(data.train, train_transform(config)), sampler, torch.device("cpu"), 0)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append([place for batch in loader.batch_sampler for place in batch])
    assert epochs[0] == epochs[2]
    seeds = [seed for epoch in epochs[:2] for _, seed in epoch]
    assert len(set(seeds)) == len(seeds) == 36
    dataset, before = loader.dataset, torch.get_rng_state()
    assert torch.equal(dataset[3, 7][0], dataset[3, 7][0])
    assert len({dataset[3, seed][0].numpy().tobytes() for seed in range(8)}) > 4
    assert torch.equal(torch.get_rng_state(), before)


def damaged(how, folder):
    file = folder / "state.pt"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "altered":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (folder / "process-0.pt").unlink()


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(birds, tmp_path, whole, capsys, how):
    shutil.copytree(whole, tmp_path / "run")
    assert [path.name for path in sorted((tmp_path / "run" / "state").iterdir())] == [
        "epoch-0002-batch-00002",
        "epoch-0003",
    ]
    damaged(how, tmp_path / "run" / "state" / "epoch-0003")
    run(birds, tmp_path / "run", *FULL, "--keep-checkpoints", "1")
    said = capsys.readouterr().out
    assert f"the checkpoint {tmp_path / 'run' / 'state' / 'epoch-0003'} cannot be loaded" in said
    assert "resuming after epoch 2 of 3 and 2 of 3 batches" in said
    assert_ends_alike(tmp_path / "run", whole)
    assert [path.name for path in (tmp_path / "run" / "state").iterdir()] == ["epoch-0003"]


def test_without_a_whole_checkpoint_nothing_is_trained_anew(birds, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    for folder in (tmp_path / "run" / "state").iterdir():
        damaged("altered", folder)
    with pytest.raises(SystemExit, match=r"no checkpoint in .* can be loaded"):
        run(birds, tmp_path / "run", *FULL)


@pytest.mark.parametrize("fails_from", [0, 2, 6])
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(birds, tmp_path, whole, monkeypatch, fails_from):
    with monkeypatch.context() as patch:
        write, calls = checkpoint.write_bytes, []

        def full(path, content):
            calls.append(path)
            if len(calls) > fails_from:
                path.write_bytes(content[:10])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, content)

        patch.setattr(checkpoint, "write_bytes", full)
        with pytest.raises(
            SystemExit, match=r"cannot write to .*No space left[\s\S]*the same command resumes from there"
        ):
            run(birds, tmp_path / "run", *FULL)
    left = [path.name for path in (tmp_path / "run" / "state").iterdir()]
    assert left == {0: [], 2: ["epoch-0000-batch-00001"], 6: left}[fails_from]  # a checkpoint is two files
    assert bool(checkpoint.Checkpoints(tmp_path / "run" / "state", 1).newest()) == bool(left)
    run(birds, tmp_path / "run", *FULL)
    assert_ends_alike(tmp_path / "run", whole)


@pytest.fixture
def in_the_foreground():
    """Tests in the background of a shell start with SIGINT ignored, and a run leaves what is ignored alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(
    ("number", "owner", "name", "call", "saved"),
    [(signal.SIGTERM, train_cub, "compute_loss", 4, "epoch-0001-batch-00001"),
     (signal.SIGINT, train_cub, "compute_loss", 6, "epoch-0001-batch-00003"),
     (signal.SIGTERM, train_cub, "predict", 1, "epoch-0002")],
)  # fmt: skip
def test_signals_save_and_stop(birds, tmp_path, whole, monkeypatch, capsys, number, owner, name, call, saved):
    flags = [*FULL, "--checkpoint-minutes", "0"]
    with monkeypatch.context() as patch:
        at_call(patch, call, owner, name, lambda: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stopped:
            run(birds, tmp_path / "run", *flags)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert max(path.name for path in (tmp_path / "run" / "state").iterdir()) == saved
    assert f"saved as {tmp_path / 'run' / 'state' / saved}; the same command resumes" in capsys.readouterr().err
    run(birds, tmp_path / "run", *flags)
    assert_ends_alike(tmp_path / "run", whole)


def test_other_data_of_the_same_name_is_refused(birds, tmp_path):
    data = tmp_path / "CUB_200_2011"
    shutil.copytree(birds, data)
    run(data, tmp_path / "run", "--epochs", "1")
    split = data / "train_test_split.txt"
    lines = split.read_text().splitlines()
    lines[0] = lines[0][:-1] + str(1 - int(lines[0][-1]))
    split.write_text("\n".join(lines) + "\n")
    with pytest.raises(SystemExit, match=r"another run:\n  sha256 .*\n  test images: 18 there, 1[79] here"):
        run(data, tmp_path / "run", "--epochs", "1")
