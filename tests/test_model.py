"""`APINet`: backbone, head, freezing, optimiser groups, saving."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from apinet_head import APIHead, APINet, api_loss

IMAGES, LABELS = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])


def make_net(**arguments):
    torch.manual_seed(0)
    return APINet("test_resnet", 5, **arguments)


def test_is_backbone_then_head():
    net = make_net(dropout=0.0, hidden_dim=16)
    assert net.dim == net.backbone.num_features
    assert isinstance(net.head, APIHead)
    features = net.backbone(IMAGES)
    assert torch.equal(net(IMAGES), net.head(features))
    pairs = net.head(features, LABELS).pairs
    for found, expected in zip(net(IMAGES, LABELS)[:4], net.head(features, LABELS, pairs=pairs)[:4], strict=True):
        assert torch.equal(found, expected)


def test_module_backbone():
    backbone = nn.Sequential(nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert APINet(backbone, 5, dim=12)(IMAGES).shape == (6, 5)
    with pytest.raises(ValueError, match=r"Sequential.*no num_features.*dim="):
        APINet(backbone, 5)
    with pytest.raises(ValueError, match="go with a timm name"):
        APINet(backbone, 5, dim=12, pretrained=True)


def test_backbone_args_reach_timm():
    net = make_net(backbone_args={"in_chans": 1, "drop_path_rate": 0.1})
    assert net(IMAGES[:, :1]).shape == (6, 5)


def test_backbone_with_its_classifier_still_on_is_an_error_that_says_so():
    import timm

    net = APINet(timm.create_model("test_resnet", num_classes=9), 5)
    with pytest.raises(ValueError, match=r"float32 \[6, 9\].*num_classes=0"):
        net(IMAGES)


def test_every_parameter_learns():
    net = make_net()
    api_loss(net(IMAGES, LABELS)).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize(("backbone_lr", "expected"), [(None, [0.1, 0.1]), (0.01, [0.01, 0.1])])
def test_parameter_groups(backbone_lr, expected):
    net = make_net()
    groups = net.parameter_groups(0.1, backbone_lr, weight_decay=0.3)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("backbone", expected[0], 0.3),
        ("head", expected[1], 0.3),
    ]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in net.parameters()}
    torch.optim.SGD(groups, momentum=0.9)


def train_step(net, optimizer):
    optimizer.zero_grad()
    api_loss(net(IMAGES, LABELS)).backward()
    optimizer.step()


def test_frozen_backbone_keeps_its_weights_and_its_batch_norm_learns_on():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameter_groups(0.1, weight_decay=0.1), momentum=0.9)
    train_step(net, optimizer)  # so that there are gradients and momentum to clear
    before = copy.deepcopy(net.state_dict())
    assert net.freeze_backbone() is net
    assert all(parameter.grad is None for parameter in net.backbone.parameters())
    train_step(net, optimizer)
    statistics = [name for name, _ in net.named_buffers() if "running" in name]
    assert statistics
    for name, _ in net.backbone.named_parameters(prefix="backbone"):
        assert torch.equal(before[name], net.state_dict()[name]), name
    for name in statistics:
        assert not torch.equal(before[name], net.state_dict()[name]), name
    assert not torch.equal(before["head.classifier.weight"], net.head.classifier.weight)

    net.freeze_backbone(False)
    train_step(net, optimizer)
    assert not torch.equal(before["backbone.conv1.0.weight"], net.state_dict()["backbone.conv1.0.weight"])


def test_batch_norm_can_be_kept_as_well():
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    net.freeze_backbone(batch_norm="eval")
    net.eval()
    net.train()
    assert net.head.training
    api_loss(net(IMAGES, LABELS)).backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    net.freeze_backbone(False)
    assert all(module.training for module in net.modules())
    with pytest.raises(ValueError, match="'train' or 'eval', got 'off'"):
        net.freeze_backbone(batch_norm="off")


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_compute_the_same(copier):
    net = make_net().eval()
    assert torch.equal(copier(net)(IMAGES), net(IMAGES))


def test_state_dict_round_trip():
    net, other = make_net(), APINet("test_resnet", 5)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(IMAGES), other.eval()(IMAGES))


def test_saved_and_loaded(tmp_path):
    net = make_net(hidden_dim=16, backbone_args={"in_chans": 1}).eval()
    net.save_pretrained(tmp_path)
    assert {"model.safetensors", "config.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    loaded = APINet.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(loaded(IMAGES[:, :1]), net(IMAGES[:, :1]))


def test_loading_asks_timm_for_no_weights(tmp_path, monkeypatch):
    import timm

    make_net().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained": True}))
    create, asked = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k))
    APINet.from_pretrained(tmp_path)
    assert asked == [False]


def test_loading_a_net_around_a_module(tmp_path):
    def backbone():
        return nn.Sequential(nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    net = APINet(backbone(), 5, dim=12).eval()
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="backbone=module"):
        APINet.from_pretrained(tmp_path)
    assert torch.equal(APINet.from_pretrained(tmp_path, backbone=backbone())(IMAGES), net(IMAGES))


def test_loading_with_weights_missing_is_an_error(tmp_path):
    make_net().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        APINet.from_pretrained(tmp_path, num_classes=6)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 itself brings sympy, when distributed is imported")
def test_import_leaves_alone_what_takes_long():
    slow = {"timm", "huggingface_hub", "torchvision", "torch._dynamo", "sympy"}
    code = f"import sys, torch; had = {{*sys.modules}}; import apinet_head; print(*({slow} & {{*sys.modules}} - had))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == []


def test_unknown_name_is_an_attribute_error():
    import apinet_head

    with pytest.raises(AttributeError, match="no attribute 'APINet2'"):
        _ = apinet_head.APINet2
    assert set(apinet_head.__all__) <= set(dir(apinet_head))
