"""What breaks around a run of train_cub.py ends it, or a step that is not finite; what was no training is in no way."""

import json
import math
import sys
from dataclasses import asdict
from unittest import mock

import pytest
import torch
from commands import finish
from cub_runs import FULL, TINY, at_call, begun, rows, run, same, weights

import train_cub
from workbench import metrics
from workbench.datasets import open_data
from workbench.images import AugmentedImages
from workbench.run_folder import RunFolder
from workbench.settings import parse

BROKEN = 8  # of 18 training images: with seeds 0 and 1 it comes once in each of the three epochs
out_of_memory = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))

BREAKS = """
import os, sys, time, train_cub
from workbench import images
images.load_image = lambda path: {}
train_cub.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("action", "timeout", "message"),
    [("os.kill(os.getpid(), 9)", "60", "DataLoader worker (pid"),
     ("time.sleep(600)", "0.5", "DataLoader timed out after 0.5 seconds")],
)  # fmt: skip
def test_workers_that_are_killed_or_hang_end_the_run_which_then_goes_on(birds, tmp_path, action, timeout, message):
    """A process of its own, for its end must not wait for the workers."""
    flags = [*TINY, "--data", str(birds), "--output", str(tmp_path / "run"), "--checkpoint-minutes", "1e-9"]
    code, _, said = finish("-c", BREAKS.format(action), *flags, "--workers", "2", "--loader-timeout", timeout)
    assert code == 1, said
    assert message in said
    train_cub.main(flags)


def test_a_full_gpu_ends_the_run_with_a_smaller_chunk_size(birds, tmp_path):
    """Other settings and data may follow, as nothing was trained."""
    with mock.patch.object(train_cub, "compute_loss", out_of_memory), pytest.raises(SystemExit) as ended:
        run(birds, tmp_path / "run", "--chunk-size", "4")
    what = "through the backbone in chunks of 4: --chunk-size 2 takes less memory for the same batch; "
    assert str(ended.value).startswith(f"\nCUDA out of memory\nThe step was one of 6 images of 32 x 32 pixels, {what}")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "settings.json", "tensorboard"}
    run(birds, tmp_path / "run", "--chunk-size", "2", "--seed", "6", "--epochs", "1")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert (settings["chunk_size"], settings["seed"]) == (2, 6)
    assert len(list((tmp_path / "run" / "tensorboard").rglob("events*"))) == 1


def test_memory_that_the_test_takes_is_no_matter_of_chunks(birds, tmp_path, monkeypatch):
    at_call(monkeypatch, 1, metrics, "to_device", out_of_memory)
    with pytest.raises(SystemExit, match="That was the test, not a training step: take fewer images at a time"):
        run(birds, tmp_path / "run")


@pytest.mark.parametrize("left", ["state/epoch-0001.damaged", "best", "log.csv"])
def test_other_settings_may_not_follow_where_anything_was_trained(birds, tmp_path, left):
    """Each of what a run trained is enough: somebody may have removed the rest, even the settings."""
    RunFolder(tmp_path / "run", asdict(parse([*TINY, "--data", str(birds), "--seed", "5"]))).begin()
    (tmp_path / "run" / left).mkdir(parents=True)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit, match=r"(?s)holds another run:\n  seed: 5 there, 6 here\n.*Choose another folder"):
        run(birds, tmp_path / "run", "--seed", "6")
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    (tmp_path / "run" / "settings.json").unlink()
    with pytest.raises(SystemExit, match="is not empty and not the folder of a run"):
        run(birds, tmp_path / "run", "--seed", "6")


@pytest.fixture
def broken(monkeypatch):
    """The training images that have infinite pixels, though not in the test."""
    get, broken = AugmentedImages.__getitem__, {BROKEN}

    def getting(self, place):
        image, label, index = get(self, place)
        return image * math.inf if index in broken else image, label, index

    monkeypatch.setattr(AugmentedImages, "__getitem__", getting)
    return broken


def test_the_run_ends_with_the_paths_and_no_weight_is_changed(birds, tmp_path, broken, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(birds, tmp_path / "run", *FULL, "--seed", "1")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    newest = max(path.name for path in (tmp_path / "run" / "state").iterdir())
    done = int(newest.removeprefix("epoch-0000-batch-"))
    step = f"step {done + 1} (epoch 1, batch {done + 1})"
    assert f"{step} is not finite: loss nan, cross_entropy nan, ranking nan" in said
    data = open_data(parse([*TINY, "--data", str(birds)]))
    assert f"  {data.train[BROKEN].path}\n" in said
    assert said.count(".jpg\n") == 6
    assert "--skip-nonfinite 10" in said


def test_steps_are_left_out_up_to_the_limit(birds, tmp_path, broken, capsys):
    with pytest.raises(SystemExit):
        run(birds, tmp_path / "run", "--skip-nonfinite", "2")
    captured = capsys.readouterr()
    assert captured.out.count("is skipped") == 2
    assert "(epoch 3, batch " in captured.err
    run(birds, tmp_path / "run", "--skip-nonfinite", "3")
    log = rows(tmp_path / "run")
    assert [(row["skipped"], row["step"]) for row in log] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert all(math.isfinite(float(row["loss"])) for row in log)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 3

    broken.update(range(18))  # and where all steps are left out, nothing at all is changed
    run(birds, tmp_path / "other", "--skip-nonfinite", "9", "--memory", "16")
    assert same(weights(tmp_path / "other" / "last"), begun(birds, "--memory", "16")[1].state_dict())


def test_gradients_that_are_not_finite_end_the_run(birds, tmp_path, monkeypatch):
    """The loss is finite, its gradient is not; what the checkpoint has is from before."""
    factors, make_net = [1, math.inf], train_cub.make_net

    def overflowing(*args):
        net = make_net(*args)
        net.head.classifier.weight.register_hook(lambda gradient: gradient * factors.pop(0))
        return net

    monkeypatch.setattr(train_cub, "make_net", overflowing)
    monkeypatch.setattr(train_cub, "end_all", lambda message, code: sys.exit(message))
    with pytest.raises(SystemExit, match=r"step 2 .*ranking [\d.e-]+, .*norm of the gradients (nan|inf)"):
        run(birds, tmp_path / "run")
    assert not factors
