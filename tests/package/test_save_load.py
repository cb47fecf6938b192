"""What APINet saves comes back as it was, or is refused when it is saved."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

from apinet_head import APINet
from apinet_head.mutual import MutualMLP

IMAGES, LABELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1])
DIM = 96  # channels of test_resnet


def make_net(num_classes=5, **arguments):
    """A net in eval mode whose BatchNorm and memory, if it has one, have seen images."""
    torch.manual_seed(0)
    net = APINet("test_resnet", num_classes, **{"hidden_dim": 16, **arguments})
    net(torch.randn(4, 3, 64, 64).to(next(net.parameters())), torch.tensor([0, 0, 1, 1]))
    return net.eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def save(net, folder):
    """As `save_pretrained`, which is to change nothing of the net."""
    before, was = copy.deepcopy([net.state_dict(), torch.get_rng_state()]), str(net)
    net.train().save_pretrained(folder)
    assert (net.training, str(net)) == (True, was)
    torch.testing.assert_close([net.state_dict(), torch.get_rng_state()], before, rtol=0, atol=0)
    net.eval()


def check_same(loaded, net):
    assert str(loaded) == str(net)
    assert (loaded.chunk_size, loaded.keep_chunks) == (net.chunk_size, net.keep_chunks)
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    images = IMAGES.to(next(net.parameters()))
    assert torch.equal(loaded(images), net(images))
    assert torch.equal(loaded(images, LABELS).logits_self, net(images, LABELS).logits_self)


class OfBirds(APINet):
    def __init__(self, species, wide=False):
        super().__init__("test_resnet", species, hidden_dim=32 if wide else 16, gather=True)


NETS = {
    "subclass with its own arguments": lambda: OfBirds(np.int64(4), wide=True),
    "memory": lambda: make_net(memory=np.int64(3)),
    "float64": lambda: make_net(dtype=torch.float64),
    "bfloat16": lambda: make_net(dtype=torch.bfloat16),
    "converted to float64": lambda: make_net().double(),
    "converted to bfloat16": lambda: make_net().bfloat16(),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_saved_net_comes_back_as_it_was_and_so_does_a_copy_of_the_loaded_one(make, tmp_path):
    net = make()
    save(net, tmp_path / "once")
    loaded = type(net).from_pretrained(tmp_path / "once")
    check_same(loaded, net)
    save(copy.deepcopy(loaded), tmp_path / "twice")
    check_same(type(net).from_pretrained(tmp_path / "twice"), net)
    assert config_of(tmp_path / "once") == config_of(tmp_path / "twice")


def test_numpy_numbers_and_tuples_come_back_as_they_were_given(tmp_path):
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "input_size": (3, 96, 96)}
    arguments = {"output_stride": np.int64(16), "drop_rate": np.float64(0.1), "layers": (1, 2, 1, 1)}
    arguments["pretrained_cfg_overlay"] = overlay
    numbers = {"dropout": np.float32(0.25), "hidden_dim": np.int32(8), "chunk_size": np.int16(2)}
    net = make_net(np.int64(7), **numbers, backbone_args=arguments)
    arguments.clear()  # what the caller does with it later is not to reach the file
    save(net, tmp_path)
    loaded = APINet.from_pretrained(tmp_path)
    check_same(loaded, net)
    assert loaded.backbone.drop_rate == 0.1
    assert (type(net.chunk_size), type(net.num_classes), type(net.dim)) == (int, int, int)
    assert config_of(tmp_path)["dtype"] == "float32"  # not the default, which may be another when it is loaded
    expected = timm.data.resolve_model_data_config(net.backbone)
    assert timm.data.resolve_model_data_config(loaded.backbone) == expected
    assert expected["input_size"] == (3, 96, 96)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"act_layer": nn.SiLU}, r"backbone_args\['act_layer'\].*class.*SiLU.*act_layer='silu'"),
        ({"block_args": {"attn_layer": {"se"}}}, r"backbone_args\['block_args'\]\['attn_layer'\].*\{'se'\}"),
        ({"block_args": {3: None}}, r"backbone_args\['block_args'\]\[3\]=None"),
        ({"drop_rate": torch.tensor(0.5)}, r"backbone_args\['drop_rate'\]=float32 \[\]"),
        ("local-dir:/birds", "backbone='local-dir:/birds'.*take a name"),
    ],
)
def test_arguments_that_json_cannot_hold_are_named_when_saving(arguments, named, tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: model)  # whatever it is given
    net = APINet(arguments, 5) if isinstance(arguments, str) else make_net(backbone_args=arguments)
    with pytest.raises(ValueError, match=named):
        net.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_weights_are_neither_downloaded_nor_read_from_a_local_file_again(tmp_path, monkeypatch):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    overlay = {"file": str(weights), "mean": (0.5, 0.5, 0.5), "num_classes": 0}
    nets = [
        make_net(backbone_args={"checkpoint_path": weights}),
        make_net(pretrained=True, backbone_args={"pretrained_cfg_overlay": overlay, "cache_dir": str(tmp_path)}),
    ]
    assert torch.equal(nets[0].backbone.conv1[0].weight, torch.load(weights, weights_only=True)["conv1.0.weight"])
    weights.unlink()
    monkeypatch.setattr(timm, "create_model", create := mock.Mock(wraps=timm.create_model))
    for number, net in enumerate(nets):
        folder = tmp_path / f"net{number}"
        save(net, folder)
        loaded = APINet.from_pretrained(folder)
        check_same(loaded, net)
        assert str(tmp_path) not in (folder / "config.json").read_text()
    assert config_of(folder)["pretrained"]
    assert {call.kwargs["pretrained"] for call in create.call_args_list} == {False}
    assert loaded.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_dtype_and_device_are_those_of_the_whole_net(tmp_path):
    net = APINet("test_resnet", 5, device="meta", dtype=torch.float16)
    assert {(value.device.type, value.dtype) for value in net.parameters()} == {("meta", torch.float16)}
    save(make_net(device=torch.device("cpu"), dtype=torch.float64), tmp_path)
    assert "device" not in config_of(tmp_path)
    assert APINet.from_pretrained(tmp_path, dtype=torch.float32)(IMAGES).dtype == torch.float32


class TwiceMLP(MutualMLP):
    """The published MLP twice over: the same weights, another function."""

    def forward(self, anchor, partner):
        return 2 * super().forward(anchor, partner)


def own_backbone():
    return nn.Sequential(nn.Conv2d(3, DIM, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


SUBCLASS, MODULE = {"mutual": partial(TwiceMLP, DIM, 16)}, {"mutual": partial(nn.Bilinear, DIM, DIM, DIM)}


@pytest.mark.parametrize("make", [SUBCLASS, MODULE, {"backbone": own_backbone, **MODULE}])
def test_own_modules_have_to_be_given_when_loading(make, tmp_path):
    def own(*names):
        return {name: make[name]() for name in names}

    net = APINet(**{"backbone": "test_resnet", "num_classes": 5, "dim": DIM, "hidden_dim": 16, **own(*make)}).eval()
    save(net, tmp_path)
    with pytest.raises(ValueError, match=r"own .*mutual=(TwiceMLP|Bilinear).*from_pretrained\(.*mutual=module\)"):
        APINet.from_pretrained(tmp_path)
    for name in make:
        with pytest.raises(ValueError, match=rf"from_pretrained\(\.\.\., {name}=module\)"):
            APINet.from_pretrained(tmp_path, **own(*(make.keys() - {name})))
    check_same(APINet.from_pretrained(tmp_path, **own(*make)), net)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda net: setattr(net.backbone, "act1", nn.SiLU()), r"backbone\.act1 is SiLU.*come back as ReLU"),
        (lambda net: setattr(net.head, "mutual", TwiceMLP(DIM, 16)), r"head\.mutual is TwiceMLP.*MutualMLP"),
        (lambda net: setattr(net.head, "classifier", nn.Linear(DIM, 6)), r"head\.classifier .*6.*5"),
        (lambda net: setattr(net.head, "intra", None), r"head is .*intra=None.*intra='similar'"),
        (lambda net: setattr(net.head.drop, "p", 0.1), r"head\.drop is .*p=0\.1.*p=0\.5"),
        (lambda net: net.backbone.bfloat16(), r"backbone\.conv1.* is bfloat16 .*would come back as float32"),
        (lambda net: parametrizations.weight_norm(net.head.classifier), r"head\.classifier is ParametrizedLinear"),
        (lambda net: nn.utils.weight_norm(net.head.classifier), r"head\.classifier\.weight_g"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_change_that_would_be_lost_is_refused_and_named(change, named, tmp_path):
    net = make_net()
    change(net)
    with pytest.raises(ValueError, match=named):
        net.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()


def compiled(net, *parts):
    """The net with these parts compiled, or all of it."""
    for name in parts:
        net.set_submodule(name, torch.compile(net.get_submodule(name), backend="eager"))
    return net if parts else torch.compile(net, backend="eager")


def compiled_in_place(net):
    net.backbone.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    "change",
    [
        compiled,
        compiled_in_place,
        lambda net: compiled(net, "backbone"),
        lambda net: compiled(net, "backbone.layer1", "head.classifier"),
        nn.SyncBatchNorm.convert_sync_batchnorm,
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_compiled_or_synchronised_net_is_saved_as_the_plain_one(change, chunk_size, tmp_path):
    plain = make_net()
    plain.reset_classifier(9)
    plain.chunk_size, plain.keep_chunks = chunk_size, 3
    net = change(copy.deepcopy(plain))
    assert torch.equal(net(IMAGES), plain(IMAGES))
    save(net, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == plain.state_dict().keys()
    check_same(APINet.from_pretrained(tmp_path), plain)


@pytest.mark.parametrize(
    "path",
    ["/no/such/dir", Path("/no/such/dir"), "./runs/best", "runs/best", ".", "./timm", "./timm/config.json"],
)
def test_what_is_no_saved_net_is_an_error_that_names_it(path, tmp_path, monkeypatch):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "resnet18", "num_classes": 3}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as refused:
        APINet.from_pretrained(path, local_files_only=True)
    expected = f"{str(path)!r} is neither a folder with an APINet's config.json nor the name of an APINet on the Hub"
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path, monkeypatch):
    def upload(api, *, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, repo_id, **__: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    net = make_net(np.int64(4))
    net.push_to_hub("user/birds")
    check_same(APINet.from_pretrained(tmp_path / "hub"), net)
