"""What a training run survives: kills at any moment, damaged checkpoints, full disks, signals, files that are code."""

import errno
import os
import random
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import TORCHRUN, start
from cub_runs import FULL, TINY, KilledError, assert_ends_alike, at_call, run

import score
import train_cub
from workbench import checkpoint, run_folder
from workbench.datasets import open_data
from workbench.images import ImageDataset, train_loader, train_transform
from workbench.run_folder import RunFolder
from workbench.settings import parse

PLACES = [
    (Path, "replace"), (Path, "mkdir"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"),
    (train_cub, "compute_loss"), (train_cub, "nonfinite"), (train_cub, "record"), (train_cub, "save_model"),
    (train_cub, "predict"), (RunFolder, "write_log"), (checkpoint, "write_bytes"), (run_folder, "write_bytes"),
]  # fmt: skip


def kill_at(patch, moment=None):
    """Have KilledError raised at the n-th moment that changes a run or its folder, its file cut; the moments passed."""
    passed = []

    def before(name, function):
        def killed_before(*args, **kwargs):
            passed.append(name)
            if len(passed) - 1 == moment:
                if name == "write_bytes":
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                raise KilledError
            return function(*args, **kwargs)

        return killed_before

    for owner, name in PLACES:
        patch.setattr(owner, name, before(name, getattr(owner, name)))
    return passed


@pytest.fixture(scope="module")
def whole(birds, tmp_path_factory):
    """A run never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        moments = kill_at(patch)
        run(birds, folder, *FULL)
    assert moments[48] == moments[61] == "compute_loss"
    return folder


@pytest.mark.parametrize("moment", [2, 14, *range(49, 61)])
def test_killed_at_any_moment_a_run_ends_as_if_never_killed(birds, tmp_path, whole, monkeypatch, moment):
    """At the first start, in the first checkpoint, or at any moment between two steps; and then again and again."""
    rng = random.Random(moment)
    for kill in (moment, *rng.sample(range(16, 45), 2), None):
        train_cub.set_seed(rng.randrange(1000))  # nothing may depend on what the new process happens to have
        ending = pytest.raises(KilledError) if kill else nullcontext()
        with monkeypatch.context() as patch, ending:
            kill_at(patch, kill)
            run(birds, tmp_path / "run", *FULL)
    assert_ends_alike(tmp_path / "run", whole)


def test_every_place_of_every_epoch_has_a_crop_of_its_own(birds):
    settings = parse([*TINY, "--data", str(birds)])
    data, config = open_data(settings), {"squash": 40, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    sampler, seeds = train_cub.make_sampler(settings, data), []
    loader = train_loader(ImageDataset(data.train, train_transform(config)), sampler, torch.device("cpu"), 0)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        seeds += [seed for batch in loader.batch_sampler for _, seed in batch]
    assert len(set(seeds)) == len(seeds) == 36
    assert len({loader.dataset[3, seed][0].numpy().tobytes() for seed in seeds}) > 4


class Code:
    """What a pickle can hold: a call, made when it is read."""

    def __reduce__(self):
        return exec, ("raise BaseException('code was run')",)


def altered(folder):
    content = bytearray((folder / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "state.pt").write_bytes(content)


def incomplete(folder):
    (folder / "process-0.pt").unlink()


def with_code(folder):
    torch.save(Code(), folder / "state.pt")


@pytest.mark.parametrize("damage", [altered, incomplete, with_code])
def test_of_a_damaged_checkpoint_the_one_before_is_used_if_there_is_one(birds, tmp_path, whole, capsys, damage):
    state = shutil.copytree(whole, tmp_path / "run") / "state"
    assert sorted(path.name for path in state.iterdir()) == ["epoch-0002-batch-00002", "epoch-0003"]
    damage(state / "epoch-0003")
    run(birds, tmp_path / "run", *FULL, "--keep-checkpoints", "1")
    said = capsys.readouterr().out
    assert f"the checkpoint {state / 'epoch-0003'} cannot be loaded" in said
    assert "resuming after epoch 2 of 3 and 2 of 3 batches" in said
    assert_ends_alike(tmp_path / "run", whole)
    assert [path.name for path in state.iterdir()] == ["epoch-0003"]
    damage(state / "epoch-0003")
    with pytest.raises(SystemExit, match=r"no checkpoint in .* can be loaded"):
        run(birds, tmp_path / "run", *FULL)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_model_folder_with_code_is_refused(whole, tmp_path, name):
    folder = shutil.copytree(whole / "best", tmp_path / "best")
    (folder / "model.safetensors").unlink()
    torch.save(Code(), folder / name)
    with pytest.raises(SystemExit, match="the model cannot be read"):
        score.main([str(folder), "--device", "cpu"])


@pytest.mark.parametrize(
    ("call", "left"),
    [(1, []), (3, ["epoch-0000-batch-00001"]), (7, ["epoch-0000-batch-00002", "epoch-0001"])],  # each is two files
)
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoints(birds, tmp_path, whole, monkeypatch, call, left):
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with monkeypatch.context() as patch:
        at_call(patch, call, checkpoint, "write_bytes", full)
        with pytest.raises(SystemExit, match=r"cannot write to .*No space left[\s\S]*same command resumes from there"):
            run(birds, tmp_path / "run", *FULL)
    assert sorted(path.name for path in (tmp_path / "run" / "state").iterdir()) == left
    run(birds, tmp_path / "run", *FULL)
    assert_ends_alike(tmp_path / "run", whole)


@pytest.fixture(autouse=True)
def in_the_foreground():
    """Tests in the background of a shell start with SIGINT ignored, and a run leaves what is ignored alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "name", "call", "saved"),
    [(signal.SIGTERM, "compute_loss", 4, "epoch-0001-batch-00001"),
     (signal.SIGINT, "compute_loss", 6, "epoch-0001-batch-00003"), (signal.SIGTERM, "predict", 1, "epoch-0002")],
)  # fmt: skip
def test_signals_save_and_stop(birds, tmp_path, whole, monkeypatch, capsys, number, name, call, saved):
    flags, state = [*FULL, "--checkpoint-minutes", "0"], tmp_path / "run" / "state"
    with monkeypatch.context() as patch:
        at_call(patch, call, train_cub, name, lambda: os.kill(os.getpid(), number))
        before = signal.getsignal(number)
        with pytest.raises(SystemExit) as stopped:
            run(birds, tmp_path / "run", *flags)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert max(path.name for path in state.iterdir()) == saved
    assert f"saved as {state / saved}; the same command resumes" in capsys.readouterr().err
    run(birds, tmp_path / "run", *flags)
    assert_ends_alike(tmp_path / "run", whole)


def test_other_data_of_the_same_name_is_refused(birds, tmp_path):
    data = shutil.copytree(birds, tmp_path / "CUB_200_2011")
    run(data, tmp_path / "run", "--epochs", "1")
    split = (data / "train_test_split.txt").read_text()
    (data / "train_test_split.txt").write_text(split.replace("1 1\n", "1 0\n", 1))
    with pytest.raises(SystemExit, match=r"another run:\n  sha256 .*\n  test images: 18 there, 19 here"):
        run(data, tmp_path / "run", "--epochs", "1")


# Runs as processes of their own, ended by real signals.
LONG = [*FULL, "--epochs", "16", "--eval-every", "8", "--checkpoint-minutes", "0.001"]


def killed(birds, output, number, delay, *flags, launcher=()):
    """Start the run, and end its whole group after two more checkpoints and a delay; (exit code, what it said)."""
    checkpoints = checkpoint.Checkpoints(output / "state", 2)
    known = seen = {*checkpoints.names()}
    train = train_cub.__file__
    process = start(*launcher, train, *TINY, "--data", birds, "--output", output, *flags, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while len(seen - known) < 2 and process.poll() is None:
            assert time.monotonic() < end, "no checkpoint in a minute"
            seen = seen | {*checkpoints.names()}
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def test_sigkill_then_sigterm_to_a_whole_group_with_workers(birds, tmp_path):
    """Workers change nothing."""
    run(birds, tmp_path / "whole", *LONG)
    assert killed(birds, tmp_path / "run", signal.SIGKILL, 0.05, *LONG)[0] == -signal.SIGKILL
    code, said = killed(birds, tmp_path / "run", signal.SIGTERM, 0.1, *LONG, "--workers", "2")
    assert code == 128 + signal.SIGTERM, said
    assert "the same command resumes from there" in said
    run(birds, tmp_path / "run", *LONG)
    assert_ends_alike(tmp_path / "run", tmp_path / "whole", last="epoch-0016")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_to_two_ranks_stop_them_at_the_same_step(birds, tmp_path, number):
    flags = [*FULL, "--n-classes", "4", "--epochs", "400", "--eval-every", "400"]
    code, said = killed(birds, tmp_path / "run", number, 0.3, *flags, launcher=TORCHRUN)
    assert code not in (0, -signal.SIGKILL), said
    assert said.count("the same command resumes from there") == 1, said
    newest = max((tmp_path / "run" / "state").glob("epoch-*"))
    assert f"saved as {newest}" in said
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list(newest.glob("process-*.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_again_and_again(birds, tmp_path, workers):
    flags = [*LONG, "--epochs", "60", "--workers", workers]
    run(birds, tmp_path / "whole", *flags)
    rng, codes = random.Random(int(workers)), []
    while not codes or codes[-1]:
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        codes.append(killed(birds, tmp_path / "run", number, rng.uniform(0, 1), *flags)[0])
        assert codes[-1] in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        assert len(codes) < 60
    assert len(codes) > 3
    assert_ends_alike(tmp_path / "run", tmp_path / "whole", last="epoch-0060")
