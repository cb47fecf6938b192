"""train_own.py and train_cub.py with weights from a file, and a head trained on features of a frozen backbone."""

import json

import pytest
import timm
import torch
from colours import FLAGS, write_colours
from cub_runs import run

import train_own
from workbench import frozen
from workbench.model_folder import load


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights of test_resnet with a classifier, in a folder whose name is not to be seen elsewhere."""
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("secret-place") / "resnet.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), file)
    return file


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_colours(tmp_path / "colours")


def train(source, *flags):
    train_own.main([str(source), "--out", str(source / "model"), *FLAGS, *map(str, flags)])
    return source / "model"


def backbone_is_from(file, folder):
    expected, found = torch.load(file), load(folder).net.backbone.state_dict()
    return all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_frozen_head_learns_and_leaves_the_backbone_as_in_the_file(source, file, capsys):
    folder = train(source, "--weights", file, "--frozen", "--epochs", 30, "--lr", 0.01)
    assert "all 75 tensors of the backbone are those of resnet.pth" in capsys.readouterr().out
    assert backbone_is_from(file, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(0.9)  # one of the ten images is in the wrong folder
    assert metrics["settings"]["frozen"]
    assert {path.name for path in folder.iterdir()} >= {"README.md", "report.html", "predictions.csv", "classes.json"}
    assert "trained from the weights of resnet.pth" in (folder / "README.md").read_text()
    for path in folder.rglob("*"):  # and the file's place is nowhere
        assert path.is_dir() or b"secret-place" not in path.read_bytes()


def test_features_are_computed_once_for_all_trainings(source, file, monkeypatch):
    train(source, "--weights", file, "--frozen", "--epochs", 1)
    before = load(source / "model").net.state_dict()
    monkeypatch.setattr(frozen, "ImageDataset", None)  # would be needed to compute more
    train(source, "--weights", file, "--frozen", "--epochs", 1, "--overwrite")
    after = load(source / "model").net.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    train(source, "--weights", file, "--frozen", "--epochs", 1, "--overwrite", "--baseline", "shuffled")


def test_prior_images_adds_the_logarithms_of_the_classes_shares_to_the_logits(source, file):
    for number in range(6):
        (source / "train/red" / f"{number}.png").unlink()
    flags = ["--weights", file, "--frozen", "--epochs", 2, "--overwrite"]
    plain = load(train(source, *flags)).net.head.classifier
    shifted = load(train(source, *flags, "--prior", "images")).net.head.classifier
    assert torch.equal(shifted.weight, plain.weight)
    shares = torch.tensor([9, 9, 3]) / 21
    torch.testing.assert_close(shifted.bias - plain.bias, shares.log(), atol=1e-6, rtol=0)


def test_without_frozen_the_backbone_is_trained_from_the_file(source, file):
    folder = train(source, "--weights", file, "--epochs", 1, "--lr", 0)
    state, expected = load(folder).net.backbone.state_dict(), torch.load(file)
    trained = [name for name, _ in load(folder).net.backbone.named_parameters()]
    assert all(torch.equal(state[name], expected[name]) for name in trained)  # BatchNorm's statistics are not
    folder = train(source, "--weights", file, "--epochs", 1, "--lr", 0.01, "--overwrite")
    assert not backbone_is_from(file, folder)


def test_weights_of_another_backbone_and_of_no_file_are_refused(source, tmp_path):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="is it a file for this --backbone"):
        train(source, "--weights", tmp_path / "other.pth")
    assert not (source / "model").exists()
    with pytest.raises(SystemExit, match="no such file of weights"):  # before images are looked for
        train(source / "none", "--weights", tmp_path / "none.pth")


def test_a_run_of_train_cub_starts_from_the_file_and_goes_on_with_it(birds, file, tmp_path, capsys):
    flags = ["--weights", str(file), "--lr", "0"]
    run(birds, tmp_path / "run", *flags)
    assert "all 75 tensors" in capsys.readouterr().out
    state, expected = load(tmp_path / "run/last").net.backbone.state_dict(), torch.load(file)
    trained = [name for name, _ in load(tmp_path / "run/last").net.backbone.named_parameters()]
    assert all(torch.equal(state[name], expected[name]) for name in trained)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["weights"].startswith("resnet.pth, sha256 ")
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"secret-place" not in path.read_bytes()

    run(birds, tmp_path / "run", *flags)  # finished already, and no other run
    other = tmp_path / "resnet.pth"
    torch.save({name: value + 1 for name, value in expected.items()}, other)
    with pytest.raises(SystemExit, match="weights: 'resnet"):
        run(birds, tmp_path / "run", "--weights", str(other), "--lr", "0")
