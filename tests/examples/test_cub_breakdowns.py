"""What breaks around a run of train.py ends it with what to do, and what was no training stands in nobody's way."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cub_runs import TINY, run
from torch.utils.data import get_worker_info

import train_cub as train
from workbench import chunk_size as chunk_auto
from workbench.images import ImageDataset
from workbench.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
WORKERS = ["--workers", "2", "--checkpoint-minutes", "1e-9"]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.00 GiB"


def in_a_worker(patch, image, action):
    """Have the first worker that loads this image do something else first."""
    get = ImageDataset.__getitem__

    def acting(self, index):
        if index == image and get_worker_info() is not None:
            action()
        return get(self, index)

    patch.setattr(ImageDataset, "__getitem__", acting)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_ends_the_run_with_what_to_do(birds, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_a_worker(patch, 7, die)
        with pytest.raises(SystemExit) as ended:
            run(birds, tmp_path / "run", *WORKERS)
    said = str(ended.value)
    assert "DataLoader worker (pid" in said
    assert "A process that loads images died, one of 2." in said
    assert "--workers 1" in said
    assert "/dev/shm" in said
    assert "the same command goes on from there" in said
    assert not multiprocessing.active_children()
    run(birds, tmp_path / "run", *WORKERS[2:], "--workers", "0")


HANGS = """
import sys, time
import train_cub as train
from workbench.images import ImageDataset
from torch.utils.data import get_worker_info

get = ImageDataset.__getitem__

def hanging(self, index):
    if index == 7 and get_worker_info() is not None:
        time.sleep(600)
    return get(self, index)

ImageDataset.__getitem__ = hanging
train.main(sys.argv[1:])
"""


def test_workers_that_hang_end_the_run_after_the_timeout(birds, tmp_path):
    """A process of its own, for its end must not wait for the workers."""
    flags = [*TINY, "--data", str(birds), "--output", str(tmp_path / "run"), *WORKERS, "--loader-timeout", "2.5"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, "-c", HANGS, *flags], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.returncode == 1, found.stderr
    assert f"No batch of images came for 2.5 s. Look whether the file system of {birds} answers" in found.stderr
    assert "--loader-timeout 5." in found.stderr
    assert "Traceback" not in found.stderr


def test_errors_of_the_images_are_not_taken_for_a_broken_loader(birds, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("an image of its own kind")

    in_a_worker(monkeypatch, 7, fail)
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker process[\s\S]*own kind"):
        run(birds, tmp_path / "run", *WORKERS)


@pytest.mark.parametrize("timeout", ["-1", "nan"])
def test_no_time_is_less_than_none(timeout, capsys):
    with pytest.raises(SystemExit):
        train.parse(["--loader-timeout", timeout])
    assert f"--loader-timeout must be at least 0, got {float(timeout)}" in capsys.readouterr().err


def out_of_memory(patch, step):
    """As CUDA raises it, in that step."""
    take, calls = train.Trainer.step, []

    def full(self, images, labels):
        calls.append(0)
        if len(calls) == step:
            raise torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
        return take(self, images, labels)

    patch.setattr(train.Trainer, "step", full)


def test_a_full_gpu_in_the_first_step_names_the_chunk_size_that_fits(birds, tmp_path, monkeypatch):
    from test_cub_chunk_auto import needed

    big = ["--n-classes", "6", "--backbone", "test_resnet"]
    settings = train.parse([*TINY, *big, "--data", str(birds)])
    monkeypatch.setattr(chunk_auto, "free_memory", lambda device: needed(settings, 4))
    with monkeypatch.context() as patch:
        out_of_memory(patch, 1)
        with pytest.raises(SystemExit) as ended:
            run(birds, tmp_path / "run", *big)
    said = str(ended.value)
    assert said.startswith(f"\n{OUT_OF_MEMORY}\n")
    assert "one of 12 images of 32 x 32 pixels, which went through the backbone as a whole (--chunk-size 0)" in said
    assert "What fits, by estimate, is --chunk-size 4: 3 chunks of 4 for a batch of 12" in said
    assert "There is no checkpoint" in said
    assert "keeps its chunk size" not in said
    run(
        birds, tmp_path / "run", *big, "--chunk-size", "4", "--epochs", "1"
    )  # nothing was trained: nothing is in the way
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["chunk_size"] == 4


def test_an_estimate_that_says_it_fits_is_not_believed(birds, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk_auto, "free_memory", lambda device: 2**40)
    out_of_memory(monkeypatch, 2)
    with pytest.raises(SystemExit) as ended:
        run(birds, tmp_path / "run", "--chunk-size", "3", "--checkpoint-minutes", "1e-9")
    said = str(ended.value)
    assert "one of 6 images of 32 x 32 pixels, which went through the backbone in chunks of 3." in said
    assert "By estimate that should have fit, the whole batch for a batch of 6" in said
    assert "try --chunk-size 1." in said
    assert "A run that has trained keeps its chunk size: with another, choose another --output too." in said
    assert "The last checkpoint is" in said


def test_without_an_estimate_the_message_has_the_rest(birds, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    out_of_memory(monkeypatch, 1)
    with pytest.raises(SystemExit, match=r"one of 6 images[\s\S]*No chunk size is known to fit \(an estimate needs .*"):
        run(birds, tmp_path / "run")


def test_memory_that_the_test_takes_is_no_matter_of_chunks(birds, tmp_path, monkeypatch):
    def full(net, loader, device):
        net.eval()
        torch.empty(2**60)  # what a CPU raises

    monkeypatch.setattr(train, "predict", full)
    with pytest.raises(SystemExit, match=r"That was the test, of 100 images at a time: take fewer, --eval-batch 50\."):
        run(birds, tmp_path / "run")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_settings_and_data_may_follow_where_nothing_was_trained(birds, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        out_of_memory(patch, 1)
        patch.setattr(chunk_auto, "free_memory", lambda device: 2**40)
        with pytest.raises(SystemExit):
            run(birds, tmp_path / "run", "--seed", "5")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"settings.json", "data.json", "tensorboard"}
    (tmp_path / "run" / "data.json").write_text('{"classes": 7}')
    run(birds, tmp_path / "run", "--seed", "6", "--epochs", "1")
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 6
    assert json.loads((tmp_path / "run" / "data.json").read_text())["classes"] == 6
    assert len(list((tmp_path / "run" / "tensorboard").rglob("events*"))) == 1


@pytest.mark.parametrize("left", ["state", "best", "log.csv"])
def test_but_not_where_anything_was(birds, tmp_path, left):
    """Each of what a run trained is enough: somebody may have removed the rest."""
    settings = train.parse([*TINY, "--data", str(birds), "--seed", "5"])
    RunFolder(tmp_path / "run", settings).begin()
    if left == "state":
        (tmp_path / "run" / left / "epoch-0001.damaged").mkdir(parents=True)
    else:
        (tmp_path / "run" / left).mkdir()
    before = tree(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"holds a run of other settings:\n  seed: 5 there, 6 here"):
        run(birds, tmp_path / "run", "--seed", "6")
    assert tree(tmp_path / "run") == before
