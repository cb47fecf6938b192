"""One model of every architecture module in timm gives features [2,D] of the D that APINet says."""

import pytest
import timm
import torch

from apinet_head import APINet

# There, many of timm's models ask for values of tensors on the meta device while they are made.
pytestmark = pytest.mark.skipif(torch.__version__ < "2.6", reason="torch 2.5 can't make them on the meta device")

MODELS = {module: names[0] for module in timm.list_modules() if (names := timm.list_models(module=module))}
MODELS["sequencer"] = "sequencer2d_s"  # the first takes 20 seconds to make


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_features_have_the_dim_apinet_says(model):
    # The meta device computes shapes alone: ViT-G and ConvNeXt-XXL cost no more than ResNet-18.
    with torch.device("meta"):
        net = APINet(model, num_classes=7).eval()
        images = torch.empty(2, *net.backbone.default_cfg["input_size"])
        with torch.no_grad():
            assert net.backbone(images).shape == (2, net.dim)
            assert net(images).shape == (2, 7)
            assert net(images, torch.empty(2, dtype=torch.long)).logits_self.shape == (8, 7)


# Two classifiers or more (distillation, scales, tokens), or layers that timm leaves out together with the classifier.
MANY_PLACES = {
    "crossvit", "efficientformer", "efficientformer_v2", "efficientvim", "efficientvit_msra", "iformer", "levit",
    "metaformer", "repvit", "shvit", "swiftformer", "volo",
}  # fmt: skip


@pytest.mark.parametrize("module", MODELS)
def test_deployed_is_the_model_that_timm_makes(module):
    with torch.device("meta"):
        net = APINet(MODELS[module], num_classes=7)
        if module in MANY_PLACES:
            with pytest.raises(ValueError, match=r"not one place for a classifier \[7, .*deploy nn.Sequential"):
                net.to_deploy()
            return
        model, expected = net.to_deploy(), timm.create_model(MODELS[module], num_classes=7)
    # The same modules in the same places, and all weights have one to go to.
    assert str(model) == str(expected.eval())
    expected.load_state_dict(model.state_dict(), assign=True)
