"""`APINet` around timm's models and where timm takes a model: features, data settings, layer decay, optimisers."""

import pytest
import timm
import torch
from releases import on_meta
from timm.optim import param_groups_layer_decay
from torch import nn

from apinet_head import APINet

# A model of every architecture module; in the quick suite of eight families.
FAMILIES = ("resnet", "convnext", "efficientnet", "vision_transformer", "swin_transformer", "regnet", "volo", "levit")
ARCHITECTURES = {module: names[0] for module in timm.list_modules() if (names := timm.list_models(module=module))}
ARCHITECTURES["sequencer"] = "sequencer2d_s"  # the first takes 20 seconds to make
each_module = pytest.mark.parametrize(
    "module", [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in ARCHITECTURES]
)
# Two classifiers or more (distillation, scales, tokens), or layers that timm leaves out together with the classifier.
MANY_PLACES = {
    "crossvit", "efficientformer", "efficientformer_v2", "efficientvim", "efficientvit_msra", "iformer", "levit",
    "metaformer", "repvit", "shvit", "swiftformer", "volo",
}  # fmt: skip


@on_meta
@each_module
def test_features_have_the_dim_apinet_says_and_deployed_is_the_model_that_timm_makes(module):
    # The meta device computes shapes alone: ViT-G and ConvNeXt-XXL cost no more than ResNet-18.
    with torch.device("meta"):
        net = APINet(ARCHITECTURES[module], num_classes=7).eval()
        images = torch.empty(2, *net.backbone.default_cfg["input_size"])
        with torch.no_grad():
            assert net.backbone(images).shape == (2, net.dim)
            assert net(images).shape == (2, 7)
            assert net(images, torch.empty(2, dtype=torch.long)).logits_self.shape == (8, 7)
        if module in MANY_PLACES:
            with pytest.raises(ValueError, match=r"not one place for a classifier \[7, .*deploy nn.Sequential"):
                net.to_deploy()
            return
        model, expected = net.to_deploy(), timm.create_model(ARCHITECTURES[module], num_classes=7)
    # The same modules in the same places, and all weights have one to go to.
    assert str(model) == str(expected.eval())
    expected.load_state_dict(model.state_dict(), assign=True)


# Of each kind one that is small, with its own way to normalise, to pool and to group layers.
MODELS = {
    "test_resnet": {}, "test_vit": {}, "test_convnext": {}, "tf_efficientnet_lite0": {}, "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 64, "window_size": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2}, "xcit_nano_12_p16_224": {"depth": 2},
}  # fmt: skip
GROUPED = [name for name in MODELS if name != "deit_tiny_distilled_patch16_224"]
OWN = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 6))  # not of timm


def make_net(backbone="test_resnet", num_classes=5):
    torch.manual_seed(0)
    arguments = {"dim": 6} if backbone is OWN else {"backbone_args": MODELS[backbone]}
    return APINet(backbone, num_classes, hidden_dim=8, **arguments).eval()


@pytest.mark.parametrize("backbone", [*MODELS, OWN])
def test_data_settings_are_the_backbones_and_forward_is_its_two_halves(backbone):
    net = make_net(backbone)
    assert timm.data.resolve_model_data_config(net) == timm.data.resolve_model_data_config(net.backbone)
    size = net.backbone.patch_embed.img_size[0] if hasattr(net.backbone, "patch_embed") else 96
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features = net.forward_features(images)
        assert torch.equal(net.forward_head(features), net(images))
        assert torch.equal(net.forward_head(features, pre_logits=True), net.backbone(images))
        assert net.num_features in {features.shape[1], features.shape[-1]}
    assert net.num_classes == 5


@pytest.mark.parametrize(("before", "after"), [(5, 9), (5, 0), (0, 4)])
def test_reset_classifier_makes_another_of_the_same_dtype(before, after):
    net = make_net(num_classes=before).bfloat16()
    net.reset_classifier(after)
    assert net.num_classes == net.head.num_classes == after
    assert net.get_classifier() is net.head.classifier
    assert net(torch.randn(2, 3, 64, 64).bfloat16()).shape == (2, after or net.dim)
    for classes, error in ((-1, ValueError), ("9", TypeError)):
        with pytest.raises(error, match="num_classes must be"):
            net.reset_classifier(classes)


def test_gradient_checkpointing_reaches_the_backbone():
    net = make_net()
    for enable in (True, False):
        net.set_grad_checkpointing(enable)
        assert net.backbone.grad_checkpointing == enable


def scales(model, decay):
    """Of each parameter its scale of the learning rate and its weight decay, by its name in the plain model."""
    groups = param_groups_layer_decay(model, 0.05, getattr(model, "no_weight_decay", set)(), layer_decay=decay)
    names = {id(p): name.replace("_orig_mod.", "").removeprefix("backbone.") for name, p in model.named_parameters()}
    return {names[id(p)]: (group.get("lr_scale"), group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_layer_decay_is_that_of_the_plain_model(name, compiled):
    net, plain = make_net(name), timm.create_model(name, num_classes=5, **MODELS[name])
    if compiled:
        net.backbone = torch.compile(net.backbone, backend="eager")
    found, expected = scales(net, 0.7), scales(plain, 0.7)
    assert len(found) == len(list(net.parameters()))
    assert len(expected.keys() - found.keys()) == 2  # of the classifier
    of_both = expected.keys() & found.keys()
    assert {key: found[key] for key in of_both} == {key: expected[key] for key in of_both}
    own = [scale for key, (scale, _) in found.items() if key not in expected or key.startswith("head.classifier")]
    assert own == 6 * [1.0]


def test_a_backbone_that_is_not_of_timm_has_one_layer_and_no_settings():
    net = make_net(OWN)
    found = scales(net, 0.5)
    assert (found["2.weight"][0], found["head.classifier.weight"][0]) == (0.5, 1.0)
    assert net.no_weight_decay() == set()
    assert not hasattr(net, "pretrained_cfg")
