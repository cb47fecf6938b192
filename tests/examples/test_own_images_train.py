"""Training on a folder of colours, from the command line to the model folder."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from colours import COLOURS, FLAGS, SHORT, write_colours
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform

import train_own
from apinet_head import APINet
from workbench.model_folder import load


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model, and one of images whose test split has a red image in the folder of green ones."""
    root = write_colours(tmp_path_factory.mktemp("own") / "colours")
    command = [sys.executable, train_own.__file__, str(root), "--out", str(root / "model"), *FLAGS]
    command += ["--no-pretrained", "--epochs", "20", "--lr", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "n_samples 9: images of each of these, the median class having 9" in done.stdout
    assert "image_size 32: as asked" in done.stdout
    return root / "model", root


def transform_of(model):
    return create_transform(**json.loads((model / "classes.json").read_text())["transform"])


def test_learns_and_tells_right_from_wrong(trained):
    model, root = trained
    net, transform = APINet.from_pretrained(str(model)).eval(), transform_of(model)
    counts = [[0] * 3 for _ in COLOURS]
    for label, name in enumerate(sorted(COLOURS)):
        for path in (root / "test" / name).iterdir():
            with torch.inference_mode():
                counts[label][int(net(transform(Image.open(path))[None]).argmax())] += 1
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["confusion"] == counts == [[3, 0, 0], [0, 3, 1], [0, 0, 3]]
    assert metrics["accuracy"] == metrics["history"][-1]["test_accuracy"] == 9 / 10
    assert metrics["history"][0]["loss"] > metrics["history"][-1]["loss"]


def test_predictions_are_those_of_the_net(trained):
    model, root = trained
    net, transform = APINet.from_pretrained(str(model)).eval(), transform_of(model)
    with (model / "predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert sorted(row["path"] for row in rows) == sorted(map(str, (root / "test").rglob("*.png")))
    for row in rows:
        with torch.inference_mode():
            probability, label = net(transform(Image.open(row["path"]))[None]).softmax(1)[0].max(0)
        assert (row["label"], row["predicted"]) == (Path(row["path"]).parent.name, sorted(COLOURS)[label])
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-3)


def test_damaged_model_is_named(trained, tmp_path):
    for name in ("model.safetensors", "config.json", "classes.json"):
        shutil.copytree(trained[0], tmp_path / name)
        (tmp_path / name / name).write_bytes((trained[0] / name).read_bytes()[:20])
        with pytest.raises(SystemExit, match="the model cannot be read"):
            load(tmp_path / name)


def test_a_model_is_not_overwritten_unless_asked(trained, tmp_path):
    model, root = trained
    shutil.copytree(model, tmp_path / "model")
    command = [str(root), "--out", str(tmp_path / "model"), *SHORT, "--baseline", "balanced"]
    with pytest.raises(SystemExit, match=r"holds a model: .*--overwrite"):
        train_own.main(command)
    with pytest.raises(SystemExit, match="something else than a model"):
        train_own.main([*command, "--out", str(root), "--overwrite"])
    assert (tmp_path / "model/README.md").read_text() == (model / "README.md").read_text()
    train_own.main([*command, "--overwrite"])
    assert "a baseline of API-Net" in (tmp_path / "model/README.md").read_text()  # the card is the new model's
    assert "cross-entropy on balanced batches" in (tmp_path / "model/report.html").read_text()
    assert not torch.equal(*(load_file(each / "model.safetensors")["head.classifier.weight"]
                             for each in (model, tmp_path / "model")))  # fmt: skip


def test_a_seed_gives_a_model_however_many_workers(trained, tmp_path):
    for workers in ("0", "2"):
        train_own.main([str(trained[1]), "--out", str(tmp_path / workers), *SHORT, "--workers", workers])
    first, second = (load_file(tmp_path / workers / "model.safetensors") for workers in ("0", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pretrained_weights_are_taken_and_learn_slower(trained, tmp_path, monkeypatch):
    # As a download leaves them: the Hub's cache, without the network.
    config = timm.get_pretrained_cfg("test_resnet")
    cached = tmp_path / "cache" / f"models--{config.hf_hub_id.replace('/', '--')}"
    net = timm.create_model("test_resnet")
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(net.state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    train_own.main(
        [str(trained[1]), "--out", str(tmp_path / "model"), *FLAGS, "--epochs", "1", "--backbone-lr", "1e-9"]
    )
    found = load_file(tmp_path / "model/model.safetensors")
    for name, weights in net.named_parameters():
        if not name.startswith("fc."):
            torch.testing.assert_close(found[f"backbone.{name}"], weights.detach(), atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "model/metrics.json").read_text())["settings"]
    assert (settings["lr"], settings["backbone_lr"]) == (3e-4, 1e-9)
    assert "from timm's pretrained weights" in (tmp_path / "model/README.md").read_text()


def test_weights_that_cannot_be_had_are_an_error_with_advice(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit, match=r"weights of test_resnet are not available(.|\n)*--no-pretrained"):
        train_own.main([str(trained[1]), "--out", str(tmp_path / "model"), *FLAGS, "--epochs", "1"])


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.27"), reason="of a newer timm")
def test_backbone_of_a_fixed_size_is_made_for_the_images(trained, tmp_path):
    train_own.main([str(trained[1]), "--out", str(tmp_path / "model"), *SHORT, "--backbone", "test_vit_relpos"])
    net, _, settings = load(tmp_path / "model")
    assert settings["input_size"] == [3, 32, 32]
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backbone", "resnet18000"], "timm has no such model"),
        (["--n-classes", "4"], "--n-classes 4: the data has 3 classes"),
        (["--out", __file__], "is a file"),
    ],
)
def test_bad_arguments_are_named(trained, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        train_own.main([str(trained[1]), "--out", str(tmp_path / "model"), *SHORT, *flags])


@pytest.mark.parametrize("flags", [["--epochs", "0"], ["--lr", "nan"], ["--image-size", "8"], ["--test-share", "1"]])
def test_numbers_out_of_range_are_refused(trained, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        train_own.main([str(trained[1]), *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_test_classes_need_training_images(trained, tmp_path):
    shutil.copytree(trained[1] / "train", tmp_path / "train")
    shutil.copytree(trained[1] / "test", tmp_path / "test")
    (tmp_path / "test/red").rename(tmp_path / "test/purple")
    with pytest.raises(SystemExit, match="no training images of the test classes purple"):
        train_own.main([str(tmp_path), "--out", str(tmp_path / "model"), *SHORT])


def test_chunks_are_taken(trained, tmp_path):
    train_own.main([str(trained[1]), "--out", str(tmp_path / "model"), *SHORT, "--chunk-size", "5"])
    assert json.loads((tmp_path / "model/metrics.json").read_text())["settings"]["chunk_size"] == 5
    assert json.loads((tmp_path / "model/config.json").read_text())["chunk_size"] == 5
