"""The loop of train_own.py: its loss, what ends it, and that it resumes where it was interrupted, bit for bit."""

import copy
import json
import os
import random
import signal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import train_own
from apinet_head import APINet, api_loss
from workbench.datasets import folders

FLAGS = ["--backbone", "test_resnet", "--image-size", "32", "--no-pretrained", "--device", "cpu", "--workers", "0"]
FLAGS += ["--epochs", "3", "--n-classes", "2", "--n-samples", "2", "--lr", "0.01"]


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of 4, 6 and 8 noisy images: 13 for training, 5 for testing."""
    root, rng = tmp_path_factory.mktemp("images") / "shades", random.Random(0)
    for name, count in {"blue": 4, "green": 6, "red": 8}.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = bytes(rng.randrange(256) for _ in range(3 * 40 * 40))
            Image.frombytes("RGB", (40, 40), pixels).save(root / name / f"{index}.png")
    return root


def train(images, out, *flags):
    train_own.main([str(images), "--out", str(out), *FLAGS, *flags])
    return load_file(out / "model.safetensors"), json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A training never interrupted."""
    return train(images, tmp_path_factory.mktemp("whole") / "model")


def untimed(metrics):
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in metrics["history"]]
    left_out = ("minutes", "machine", "settings")
    return {name: value for name, value in metrics.items() if name not in left_out} | {"history": history}


def assert_ends_alike(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    assert untimed(one[1]) == untimed(other[1])


@pytest.mark.parametrize("baseline", ["", "balanced"])
def test_the_loss_is_that_of_the_method(baseline):
    torch.manual_seed(0)
    net = APINet("test_resnet", 2)
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    twin = copy.deepcopy(net)
    torch.manual_seed(0)  # of the dropout
    loss = F.cross_entropy(twin(images), labels) if baseline else api_loss(twin(images, labels))
    torch.manual_seed(0)
    found = train_own.compute_loss(net, images, labels, baseline)
    assert found["loss"].item() == pytest.approx(loss.item())
    assert 0 <= found["train_accuracy"] <= 1


def in_step(number, happen):
    """`compute_loss`, and in that step something happens first."""
    compute_loss, calls = train_own.compute_loss, []

    def computed(*args):
        calls.append(0)
        if len(calls) == number:
            happen()
        return compute_loss(*args)

    return computed


def kill():
    raise KilledError


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_killed_in_any_step_it_ends_as_if_never_killed(images, whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(train_own, "compute_loss", in_step(step, kill))
        with pytest.raises(KilledError):
            train(images, tmp_path / "model", "--checkpoint-minutes", "1e-9")
    assert not (tmp_path / "model" / "classes.json").exists()
    torch.manual_seed(123)  # nothing may depend on what the new process happens to have
    assert_ends_alike(train(images, tmp_path / "model", "--workers", "2" if step == 5 else "0"), whole)
    assert not (tmp_path / "model" / "run").exists()


def test_sigterm_saves_and_stops(images, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train_own, "compute_loss", in_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(SystemExit) as stopped:
            train(images, tmp_path / "model", "--checkpoint-minutes", "0")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "saved as" in (said := capsys.readouterr().err)
    assert "the same command resumes from there" in said
    assert_ends_alike(train(images, tmp_path / "model", "--checkpoint-minutes", "0"), whole)


def test_other_settings_do_not_go_on_with_a_run(images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train_own.report, "write", lambda *_: kill())
        with pytest.raises(KilledError):
            train(images, tmp_path / "model")
    with pytest.raises(SystemExit, match=r"holds another run:\n.*\n  lr: 0.01 there, 0.5 here"):
        train(images, tmp_path / "model", "--lr", "0.5", "--overwrite")


def test_loss_that_is_not_finite_ends_it_with_the_images(images, tmp_path, monkeypatch, capsys):
    compute_loss = train_own.compute_loss

    def broken(*args):
        found = compute_loss(*args)
        return found | {"loss": found["loss"] * float("nan")}

    monkeypatch.setattr(train_own, "compute_loss", broken)
    with pytest.raises(SystemExit) as ended:
        train(images, tmp_path / "model")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "step 1 is not finite: loss nan" in said
    assert "try a lower --lr than 0.01" in said
    assert said.count(".png") == 4


def test_memory_that_runs_out_ends_with_a_chunk_size(images, tmp_path, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_own, "compute_loss", full)
    with pytest.raises(SystemExit, match=r"4 images of 32 x 32 pixels, .* all at once: --chunk-size 2"):
        train(images, tmp_path / "model")


def test_shuffled_batches_have_no_image_twice_and_balanced_ones_all_classes_alike(images):
    data = folders.read(images).as_image_set("shades")
    batches, notes = {}, {}
    for baseline in ("shuffled", "balanced"):
        options = train_own.make_parser().parse_args(["DIR", *FLAGS, "--baseline", baseline])
        sampler, notes[baseline] = train_own.make_sampler(options, data)
        batches[baseline] = list(sampler)
    shuffled = [row for batch in batches["shuffled"] for row in batch]
    assert len(set(shuffled)) == len(shuffled) == 12  # of 13, in whole batches
    assert {len(batch) for batch in batches["shuffled"]} == {4}
    for batch in batches["balanced"]:
        labels = [data.train[row].label for row in batch]
        assert sorted(map(labels.count, set(labels))) == [2, 2]
    seen = len({row for batch in batches["balanced"] for row in batch})
    assert f"the first one has {seen} of the 13 training images" in notes["balanced"]
    assert "predicts rare classes too often" in notes["balanced"]
    assert "none of which occurs twice" in notes["shuffled"]


@pytest.mark.parametrize(("baseline", "warned"), [("", True), ("balanced", False), ("shuffled", False)])
def test_images_without_partners_are_warned_of_where_pairs_are_made(images, recwarn, baseline, warned):
    flags = [*FLAGS, "--n-samples", "1", *(["--baseline", baseline] if baseline else [])]
    options = train_own.make_parser().parse_args(["DIR", *flags])
    note = train_own.make_sampler(options, folders.read(images).as_image_set("shades"))[1]
    assert ("Use --n-samples 2 or more" in note) == warned
    # The sampler's advice is an argument of the head, which no flag sets. Garbage of other tests may warn meanwhile.
    assert not [warning for warning in recwarn if warning.category is UserWarning]
