"""One model of every architecture module in timm gives features [2,D] of the D that APINet says."""

import pytest
import timm
import torch

from apinet_head import APINet

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
