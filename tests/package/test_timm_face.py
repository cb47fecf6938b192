"""`APINet` where timm takes a model: data settings, classifier, features, layer decay, optimisers."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from apinet_head import APINet

# Of each family one that is small, with its own way to normalise, to pool and to group layers.
MODELS = {
    "test_resnet": {}, "test_convnext": {}, "test_vit": {}, "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64, "window_size": 2},
    "mobilenetv3_small_050": {}, "tf_efficientnet_lite0": {}, "deit_tiny_distilled_patch16_224": {"depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
    "regnetx_002": {}, "densenet121": {},
}  # fmt: skip
GROUPED = [name for name in MODELS if name not in ("deit_tiny_distilled_patch16_224",)]


def make_net(name="test_resnet", num_classes=5):
    torch.manual_seed(0)
    return APINet(name, num_classes, hidden_dim=8, backbone_args=MODELS[name]).eval()


def images_for(net):
    size = net.backbone.patch_embed.img_size[0] if hasattr(net.backbone, "patch_embed") else 96
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_data_settings_are_the_backbones(name):
    net = make_net(name)
    assert timm.data.resolve_model_data_config(net) == timm.data.resolve_model_data_config(net.backbone)


def test_data_settings_of_efficientnet_lite():
    settings = timm.data.resolve_model_data_config(APINet("tf_efficientnet_lite0", 4))
    assert settings["mean"] == settings["std"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_its_two_halves(name):
    net = make_net(name)
    images = images_for(net)
    with torch.no_grad():
        features = net.forward_features(images)
        assert torch.equal(net.forward_head(features), net(images))
        assert torch.equal(net.forward_head(features, pre_logits=True), net.backbone.forward_head(features))
        channels = {features.shape[1], features.shape[-1]}
    assert net.num_features in channels
    assert net.num_classes == 5


def test_halves_of_a_module_that_is_not_of_timm():
    net = APINet(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), 3, dim=6).eval()
    images = torch.randn(2, 3, 2, 2)
    features = net.forward_features(images)
    assert torch.equal(features, net.backbone(images))
    assert torch.equal(net.forward_head(features), net(images))
    assert torch.equal(net.forward_head(features, pre_logits=True), features)
    assert net.num_features == 6
    assert not hasattr(net, "pretrained_cfg")
    assert net.no_weight_decay() == set()


@pytest.mark.parametrize("classes", [9, 0])
def test_reset_classifier(classes):
    net = make_net().bfloat16()
    net.reset_classifier(classes)
    assert net.num_classes == net.head.num_classes == classes
    assert net.get_classifier() is net.head.classifier
    out = net(torch.randn(2, 3, 64, 64).bfloat16())
    assert out.shape == (2, classes or net.dim)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        net.reset_classifier(-1)
    with pytest.raises(TypeError, match="num_classes must be an int"):
        net.reset_classifier("9")


def test_reset_classifier_of_a_net_that_had_none():
    net = make_net(num_classes=0)
    net.reset_classifier(4)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_gradient_checkpointing_reaches_the_backbone():
    net = make_net()
    net.set_grad_checkpointing()
    assert net.backbone.grad_checkpointing
    net.set_grad_checkpointing(False)
    assert not net.backbone.grad_checkpointing


def scales(model, groups, prefix=""):
    """Of each parameter its scale of the learning rate and its weight decay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)].replace("_orig_mod.", "").removeprefix(prefix): (
            group.get("lr_scale"),
            group["weight_decay"],
        )
        for group in groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_layer_decay_is_that_of_the_plain_model(name, compiled):
    net, plain = make_net(name), timm.create_model(name, num_classes=5, **MODELS[name])
    if compiled:
        net.backbone = torch.compile(net.backbone, backend="eager")
    found = scales(net, param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=0.7), "backbone.")
    none = getattr(plain, "no_weight_decay", set)()
    expected = scales(plain, param_groups_layer_decay(plain, 0.05, none, layer_decay=0.7))
    of_classifier = {key for key in expected if key not in found}
    assert of_classifier
    assert len(of_classifier) == 2
    assert {key: value for key, value in found.items() if not key.startswith("head.") or key in expected} == {
        key: value for key, value in expected.items() if key not in of_classifier
    }
    heads = {name: scale for name, scale in found.items() if name.startswith(("head.mutual", "head.classifier"))}
    assert len(heads) == 6
    assert {scale for scale, _ in heads.values()} == {1.0}
    assert len(found) == len(list(net.parameters()))


@pytest.mark.parametrize("name", GROUPED)
def test_weight_decay_leaves_out_what_the_backbone_leaves_out(name):
    net, plain = make_net(name), timm.create_model(name, num_classes=0, **MODELS[name])
    none = getattr(plain, "no_weight_decay", set)()
    expected = scales(plain, param_groups_weight_decay(plain, 0.05, no_weight_decay_list=none))
    found = scales(net, param_groups_weight_decay(net, 0.05, no_weight_decay_list=net.no_weight_decay()), "backbone.")
    assert {key: found[key] for key in expected} == expected
    assert found["head.classifier.weight"] == (None, 0.05)
    assert found["head.classifier.bias"] == (None, 0.0)


@pytest.mark.parametrize("layer_decay", [None, 0.8])
@pytest.mark.parametrize("name", MODELS)
def test_timm_makes_an_optimiser(name, layer_decay):
    net = make_net(name).train()
    optimizer = create_optimizer_v2(net, "adamw", lr=0.1, weight_decay=0.05, layer_decay=layer_decay)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in net.parameters())


def test_layer_decay_without_a_backbone_of_timm():
    net = APINet(nn.Sequential(nn.Flatten(), nn.Linear(12, 6)), 3, dim=6)
    found = scales(net, param_groups_layer_decay(net, 0.05, layer_decay=0.5))
    assert found["head.classifier.weight"][0] == 1.0
    assert found["backbone.1.weight"][0] == 0.5
