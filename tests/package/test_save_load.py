"""What APINet saves comes back as it was, or is refused when it is saved."""

import copy
import json
import os
import shutil
import subprocess
import sys
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

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
DIM = 96  # channels of test_resnet


def make_net(num_classes=5, **arguments):
    """A net in eval mode whose BatchNorm has seen images."""
    torch.manual_seed(0)
    net = APINet("test_resnet", num_classes, **{"hidden_dim": 16, **arguments})
    first = net.backbone.conv1[0].weight
    net.backbone(torch.randn(4, first.shape[1], 64, 64).to(first))
    return net.eval()


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def round_trip(net, folder):
    net.save_pretrained(folder)
    return type(net).from_pretrained(folder)


def check_same(loaded, net, images=IMAGES):
    assert str(loaded) == str(net)
    torch.testing.assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(images), net(images))


def test_numpy_numbers_and_tuples_come_back(tmp_path):
    overlay = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "input_size": (3, 96, 96)}
    numbers = {"output_stride": np.int64(16), "drop_rate": np.float64(0.1)}
    net = make_net(
        np.int64(7), dropout=np.float32(0.25), hidden_dim=np.int32(8), chunk_size=np.int16(2),
        backbone_args={**numbers, "pretrained_cfg_overlay": overlay, "layers": (1, 2, 1, 1)},
    )  # fmt: skip
    loaded = round_trip(net, tmp_path)
    check_same(loaded, net)
    written = config_of(tmp_path)["backbone_args"]
    assert (written["output_stride"], written["drop_rate"]) == (16, 0.1)
    assert (loaded.head.drop.p, loaded.chunk_size) == (0.25, 2)
    assert (type(net.chunk_size), type(net.num_classes), type(net.dim)) == (int, int, int)
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


def test_arguments_changed_by_the_caller_afterwards_do_not_reach_the_file(tmp_path):
    arguments = {"in_chans": 1}
    net = make_net(backbone_args=arguments)
    arguments["in_chans"] = 3
    check_same(round_trip(net, tmp_path), net, IMAGES[:, :1])
    assert config_of(tmp_path)["backbone_args"] == {"in_chans": 1}


def test_weights_of_a_local_file_are_not_asked_for_again(tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    overlay = {"file": str(weights), "mean": (0.5, 0.5, 0.5), "num_classes": 0}
    nets = [
        make_net(backbone_args={"checkpoint_path": weights}),
        make_net(pretrained=True, backbone_args={"pretrained_cfg_overlay": overlay, "cache_dir": str(tmp_path)}),
    ]
    assert torch.equal(nets[0].backbone.conv1[0].weight, torch.load(weights, weights_only=True)["conv1.0.weight"])
    weights.unlink()
    for number, net in enumerate(nets):
        folder = tmp_path / f"net{number}"
        check_same(round_trip(net, folder), net)
        assert str(tmp_path) not in (folder / "config.json").read_text()
    assert APINet.from_pretrained(folder).pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def test_memory_of_past_features_comes_back_filled(tmp_path):
    net = make_net(memory=np.int64(3)).train()
    net(IMAGES, torch.tensor([0, 0, 1]))
    assert net.head.memory.filled == 3
    check_same(round_trip(net.eval(), tmp_path), net)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("converted", [True, False])
def test_dtype_comes_back(dtype, converted, tmp_path):
    net = make_net().to(dtype) if converted else make_net(dtype=dtype)
    check_same(round_trip(net, tmp_path), net, IMAGES.to(dtype))
    assert APINet.from_pretrained(tmp_path, dtype=torch.float32)(IMAGES).dtype == torch.float32


def test_dtype_and_device_are_those_of_the_whole_net(tmp_path):
    net = APINet("test_resnet", 5, device="meta", dtype=torch.float16)
    assert {(value.device.type, value.dtype) for value in net.parameters()} == {("meta", torch.float16)}
    make_net(device=torch.device("cpu")).save_pretrained(tmp_path)
    assert "device" not in config_of(tmp_path)


class TwiceMLP(MutualMLP):
    """The published MLP twice over: the same weights, another function."""

    def forward(self, anchor, partner):
        return 2 * super().forward(anchor, partner)


class OwnMutual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 3.0))

    def forward(self, anchor, partner):
        return self.scale * anchor * partner


def own_backbone():
    return nn.Sequential(nn.Conv2d(3, DIM, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


SUBCLASS, MODULE = {"mutual": lambda: TwiceMLP(DIM, 16)}, {"mutual": lambda: OwnMutual(DIM)}


@pytest.mark.parametrize("make", [SUBCLASS, MODULE, {"backbone": own_backbone, **MODULE}])
def test_own_modules_have_to_be_given_when_loading(make, tmp_path):
    def own(*names):
        return {name: make[name]() for name in names}

    net = APINet(**{"backbone": "test_resnet", "num_classes": 5, "dim": DIM, "hidden_dim": 16, **own(*make)}).eval()
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"own .*mutual=(TwiceMLP|OwnMutual).*from_pretrained\(.*mutual=module\)"):
        APINet.from_pretrained(tmp_path)
    for name in make:
        with pytest.raises(ValueError, match=rf"from_pretrained\(\.\.\., {name}=module\)"):
            APINet.from_pretrained(tmp_path, **own(*(make.keys() - {name})))
    loaded = APINet.from_pretrained(tmp_path, **own(*make))
    check_same(loaded, net)
    labels = torch.tensor([0, 0, 1])
    assert torch.equal(loaded(IMAGES, labels).logits_self, net(IMAGES, labels).logits_self)


def test_another_number_of_classes_and_chunk_size_are_saved(tmp_path):
    net = make_net()
    net.reset_classifier(9)
    net.chunk_size, net.keep_chunks = 2, 3
    loaded = round_trip(net.eval(), tmp_path)
    check_same(loaded, net)
    assert (loaded.chunk_size, loaded.keep_chunks) == (2, 3)


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


def test_saving_changes_nothing(tmp_path):
    net = make_net(mutual=OwnMutual(DIM)).train()
    before = copy.deepcopy([net.state_dict(), str(net), torch.get_rng_state()])
    net.save_pretrained(tmp_path)
    assert net.training
    assert str(net) == before.pop(1)
    torch.testing.assert_close([net.state_dict(), torch.get_rng_state()], before, rtol=0, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: net])
def test_loaded_and_saved_again_is_the_same(copied, tmp_path):
    net = make_net(backbone_args={"in_chans": 3})
    check_same(round_trip(copied(round_trip(net, tmp_path / "once")), tmp_path / "twice"), net)
    assert config_of(tmp_path / "once") == config_of(tmp_path / "twice")


class OfBirds(APINet):
    def __init__(self, species, wide=False):
        super().__init__("test_resnet", species, hidden_dim=32 if wide else 16, gather=True)


def test_a_subclass_comes_back_with_its_own_arguments(tmp_path):
    net = OfBirds(np.int64(4), wide=True).eval()
    check_same(round_trip(net, tmp_path), net)


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
    plain = make_net(chunk_size=chunk_size)
    net = change(copy.deepcopy(plain))
    assert torch.equal(net(IMAGES), plain(IMAGES))
    net.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == plain.state_dict().keys()
    check_same(APINet.from_pretrained(tmp_path), plain)


IN_FOLDER = ["{folder}", "{folder}/nowhere", "{folder}/timm", "{folder}/timm/config.json"]


@pytest.mark.parametrize("path", ["/no/such/dir", Path("/no/such/dir"), "./runs/best", "runs/best", *IN_FOLDER])
def test_what_is_no_saved_net_is_an_error_that_names_it(path, tmp_path):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "resnet18", "num_classes": 3}')
    path = type(path)(str(path).format(folder=tmp_path))
    with pytest.raises(FileNotFoundError) as refused:
        APINet.from_pretrained(path, local_files_only=True)
    expected = f"{str(path)!r} is neither a folder with an APINet's config.json nor the name of an APINet on the Hub"
    assert str(refused.value).startswith(expected)
    assert "\n" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_another_process_loads_a_saved_net(tmp_path):
    net = make_net(backbone_args={"in_chans": np.int64(3)}, gate="single")
    net.save_pretrained(tmp_path / "net")
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import torch; from apinet_head import APINet; torch.set_default_dtype(torch.float64); "
        "net = APINet.from_pretrained('net'); torch.save(net(torch.load('images.pt', weights_only=True)), 'logits.pt')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), net(IMAGES), rtol=0, atol=1e-6)


def test_loading_asks_timm_for_no_weights(tmp_path, monkeypatch):
    make_net().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(tmp_path), "pretrained": True}))
    create = mock.Mock(wraps=timm.create_model)
    monkeypatch.setattr(timm, "create_model", create)
    APINet.from_pretrained(tmp_path)
    assert [call.kwargs["pretrained"] for call in create.call_args_list] == [False]


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path, monkeypatch):
    def upload(api, *, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, repo_id, **__: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    net = make_net(np.int64(4))
    net.push_to_hub("user/birds")
    check_same(APINet.from_pretrained(tmp_path / "hub"), net)
    with pytest.raises(ValueError, match="act_layer"):
        make_net(backbone_args={"act_layer": nn.SiLU}).push_to_hub("user/birds")
