"""What breaks around a run of train_cub.py ends it, and what was no training stands in nobody's way."""

import json
import multiprocessing
import os
import signal
from dataclasses import asdict

import pytest
import torch
from commands import finish
from cub_runs import TINY, at_call, in_a_worker, run

import train_cub
from workbench.images import end_workers_with_the_parent
from workbench.run_folder import RunFolder
from workbench.settings import parse

WORKERS = ["--workers", "2", "--checkpoint-minutes", "1e-9"]
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 9.00 GiB"


@pytest.fixture
def clean_up():
    """What a process does at its end."""
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    end_workers_with_the_parent()
    for child in multiprocessing.active_children():
        child.join(10)
    signal.signal(signal.SIGCHLD, handler)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("clean_up")
def test_a_worker_killed_ends_the_run_which_then_goes_on(birds, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        in_a_worker(patch, 7, die)
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
            run(birds, tmp_path / "run", *WORKERS)
    run(birds, tmp_path / "run", *WORKERS[2:], "--workers", "0")


HANGS = """
import sys, time, pytest, cub_runs, train_cub
cub_runs.in_a_worker(pytest.MonkeyPatch(), 7, lambda: time.sleep(600))
train_cub.main(sys.argv[1:])
"""


def test_workers_that_hang_end_the_run_after_the_timeout(birds, tmp_path):
    """A process of its own, for its end must not wait for the workers."""
    flags = [*TINY, "--data", str(birds), "--output", str(tmp_path / "run"), *WORKERS, "--loader-timeout", "2.5"]
    code, _, said = finish("-c", HANGS, *flags)
    assert code == 1, said
    assert "DataLoader timed out after 2.5 seconds" in said


def test_errors_of_the_images_are_not_taken_for_a_broken_loader(birds, tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("an image of its own kind")

    in_a_worker(monkeypatch, 7, fail)
    with pytest.raises(RuntimeError, match=r"Caught RuntimeError in DataLoader worker process[\s\S]*own kind"):
        run(birds, tmp_path / "run", *WORKERS)


def out_of_memory():
    """As CUDA raises it."""
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("flags", "chunks", "less"), [([], "all at once", 3), (["--chunk-size", "4"], "in chunks of 4", 2)]
)
def test_a_full_gpu_ends_the_run_with_a_smaller_chunk_size(birds, tmp_path, monkeypatch, flags, chunks, less):
    """Other settings and data may follow, as nothing was trained."""
    with monkeypatch.context() as patch:
        at_call(patch, 1, train_cub, "compute_loss", out_of_memory)
        with pytest.raises(SystemExit) as ended:
            run(birds, tmp_path / "run", *flags)
    said = str(ended.value)
    assert said.startswith(f"\n{OUT_OF_MEMORY}\nThe step was one of 6 images of 32 x 32 pixels")
    assert f"through the backbone {chunks}: --chunk-size {less} takes less memory" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "settings.json", "tensorboard"}
    run(birds, tmp_path / "run", "--chunk-size", str(less), "--seed", "6", "--epochs", "1")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["chunk_size"], settings["seed"]) == (less, 6)
    assert len(list((tmp_path / "run" / "tensorboard").rglob("events*"))) == 1


def test_memory_that_the_test_takes_is_no_matter_of_chunks(birds, tmp_path, monkeypatch):
    def full(net, loader, device):
        net.eval()
        out_of_memory()

    monkeypatch.setattr(train_cub, "predict", full)
    with pytest.raises(SystemExit, match="That was the test, not a training step: take fewer images at a time"):
        run(birds, tmp_path / "run")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["state/epoch-0001.damaged", "best", "log.csv"])
def test_other_settings_may_not_follow_where_anything_was_trained(birds, tmp_path, left):
    """Each of what a run trained is enough: somebody may have removed the rest."""
    RunFolder(tmp_path / "run", asdict(parse([*TINY, "--data", str(birds), "--seed", "5"]))).begin()
    (tmp_path / "run" / left).mkdir(parents=True)
    before = tree(tmp_path / "run")
    with pytest.raises(SystemExit, match=r"(?s)holds another run:\n  seed: 5 there, 6 here\n.*Choose another folder"):
        run(birds, tmp_path / "run", "--seed", "6")
    assert tree(tmp_path / "run") == before
