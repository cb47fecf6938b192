"""explain_pair: the channels that it names, where its heat maps are hot, and that it leaves the net as it was."""

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from stand_ins import Calling
from torch import nn

from apinet_head import APINet, ChunkedBackbone, Pairs
from apinet_head.explain import explain_pair, features_and_maps

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*deprecated")


class Tiny(nn.Module):
    """A backbone of one convolution; its map is a fourth of the image, in NCHW, NHWC or as tokens."""

    num_features = 6

    def __init__(self, layout="NCHW", prefix=0, reduction=4):
        super().__init__()
        self.layout, self.num_prefix_tokens, self.output_fmt = layout, prefix, layout
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.feature_info = [{"reduction": reduction}] if reduction else None

    def grid(self, images):
        return self.drop(self.norm(self.conv(images)))

    def forward_features(self, images):
        maps = self.grid(images)
        if self.layout == "tokens":
            return F.pad(maps.flatten(2).transpose(1, 2), (0, 0, self.num_prefix_tokens, 0), value=100.0)
        return maps.permute(0, 2, 3, 1) if self.layout == "NHWC" else maps

    def forward(self, images):
        return self.grid(images).mean((2, 3))


def pooling(**attributes):
    """A backbone whose map is the images."""
    return Calling(lambda images: images.mean((2, 3)), forward_features=nn.Identity(), **attributes)


def two(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def make(backbone, head=None, **backbone_args):
    torch.manual_seed(0)
    net = APINet(backbone, 3, **(head or {}), backbone_args=backbone_args or None)
    if hasattr(net.head.mutual, "fc2"):  # gates far enough apart to be told from rounding
        nn.init.normal_(net.head.mutual.fc2.weight, std=0.5)
    return net


def quantize_dynamically(net):
    quantization = pytest.importorskip("torch.ao.quantization", reason="moved to torchao")
    return quantization.quantize_dynamic(net, {nn.Linear})


def expected_maps(maps, channels, size):
    """By the definition: enlarge a channel, subtract its least value, divide by the largest that is left."""
    chosen = torch.stack([maps[image, rows] for image, rows in enumerate(channels)])
    heat = F.interpolate(chosen, size, mode="bilinear")
    heat = heat - heat.amin((2, 3), keepdim=True)
    return heat / heat.amax((2, 3), keepdim=True)


compiled = partial(torch.compile, backend="eager")
WRAPS = {
    "plain": lambda backbone: backbone,
    "compiled": compiled,
    "compiled chunks": lambda backbone: ChunkedBackbone(compiled(backbone), 1),
    "chunks, compiled": lambda backbone: compiled(ChunkedBackbone(backbone, 1)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("size", [(24, 24), (16, 32)])
def test_heat_maps_are_the_channels_of_the_map(layout, size, wrap):
    net, images = make(Tiny(layout, prefix=3 if layout == "tokens" else 0)).eval(), two(*size)
    with torch.no_grad():
        maps = net.backbone.grid(images)
    net.backbone = wrap(net.backbone)
    seen = explain_pair(net, images, top_k=4)
    torch.testing.assert_close(seen.heatmaps, expected_maps(maps, seen.channels, size))
    torch.testing.assert_close(seen.plain_heatmaps, expected_maps(maps, seen.plain_channels, size))
    assert seen.plain_channels.tolist() == maps.mean((2, 3)).topk(4).indices.tolist()
    one, other = maps.mean((2, 3))
    torch.testing.assert_close(seen.similarity, one @ other / one.norm() / other.norm())


NEWEST = Version(timm.__version__) >= Version("1.0.27")  # before, some models told less of their last map
MODELS = {
    "resnet18": (64, 64), "test_resnet": (64, 96), "test_vit": (160, 160), "test_vit2": (160, 160),
    "test_vit4": (160, 160), "test_convnext": (64, 96), "test_efficientnet": (64, 96), "test_nfnet": (64, 64),
    "levit_128s": (224, 224), "pvt_v2_b0": (64, 64), "efficientformer_l1": (224, 224), "mobilenetv2_035": (64, 64),
    "swin_tiny_patch4_window7_224": (224, 224), **({"coat_lite_tiny": (224, 224)} if NEWEST else {}),
}  # fmt: skip
NETS = {
    **{name: (partial(make, name), two(*size)) for name, size in MODELS.items()},
    "single gate": (lambda: make("test_resnet", {"gate": "single"}), two(64, 64)),
    "individual": (lambda: make("test_resnet", {"mutual": "individual"}), two(64, 64)),
    "quantised": (lambda: quantize_dynamically(make("test_vit", img_size=64)), two(64, 64)),
    "in half precision": (lambda: make(Tiny()).bfloat16(), two(16, 16).bfloat16()),
    "chunks": (lambda: APINet(ChunkedBackbone(Tiny(), 1), 3, dim=6), two(16, 16)),
    "of two dtypes": (lambda: APINet(pooling(float64=nn.Parameter(torch.zeros(1).double())), 3, dim=3), two(16, 16)),
    "no float parameters": (lambda: quantize_dynamically(APINet(pooling(), 3, dim=3)), two(16, 16)),
}


@pytest.mark.parametrize("name", NETS)
def test_channels_are_those_of_the_largest_gates_and_their_map_is_the_one_that_was_pooled(name):
    make, images = NETS[name]
    net = make()
    top_k = min(net.dim, 7)
    seen = explain_pair(net, images, top_k=top_k)
    pair = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([False]), torch.tensor([True]))
    with torch.no_grad():
        features, maps = features_and_maps(net.eval().backbone, images)
        torch.testing.assert_close(seen.gates, torch.cat(net.head.gates(net.backbone(images), pair)))
    for values, channels in ((seen.gates, seen.channels), (features, seen.plain_channels)):
        assert channels.dtype == torch.int64
        for row, chosen in zip(values.tolist(), channels.tolist(), strict=True):
            assert chosen == sorted(range(net.dim), key=lambda channel: -row[channel])[:top_k]
    for heat in (seen.heatmaps, seen.plain_heatmaps):
        assert heat.shape == (2, top_k, *images.shape[-2:])
        assert heat.min() == 0
        assert set(heat.amax((2, 3)).unique().tolist()) <= {0, 1}  # 0: a channel that is the same everywhere
    assert not any(field.requires_grad for field in seen)
    # Average pooling and at most a norm lie between features and maps, so that a channel mix-up would show.
    rows = torch.stack([features[0], maps.mean((2, 3))[0]]).float()
    has_a_token_as_feature = name in ("test_vit", "quantised", "coat_lite_tiny")
    assert torch.corrcoef(rows)[0, 1] > 0.99 or has_a_token_as_feature


def with_hidden_layer():
    net = make(Tiny())
    net.backbone.pre_logits = nn.Sequential(nn.Linear(6, 6))
    return net


GRID = "7 x 7" if NEWEST else "8 x 8"
REFUSED = {
    "other channels": (lambda: make("mobilenetv3_small_050"), "1024 .* of MobileNetV3 are not the 288 of its last"),
    "hidden layer": (lambda: make("test_mambaout"), r"hidden layer \(head.pre_logits\) after its feature map"),
    "quantised hidden layer": (lambda: quantize_dynamically(with_hidden_layer()), r"hidden layer \(pre_logits\)"),
    "pooled by attention": (lambda: make("test_vit3"), "pools by attention.*global_pool"),
    "one token": (lambda: make("pit_ti_224"), f"returns 1 tokens.*do not form a grid of {GRID} patches"),
    "unknown grid": (lambda: make(Tiny("tokens", reduction=None)), "grid is unknown"),
    "another grid": (lambda: make(Tiny("tokens", reduction=8)), "do not form a grid of 4 x 4 patches"),
    "several maps": (lambda: make("crossvit_9_240"), "must return one map.*got list"),
    "no forward_features": (lambda: APINet(nn.Flatten(), 3, dim=3072), r"Flatten has no forward_features\(images\)"),
    "under DDP": (lambda: Calling(None, module=make(Tiny())), r"an APINet, got Calling: pass its \.module"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_models_whose_gates_have_no_map_are_refused(make, why):
    net = make().train()
    config = getattr(getattr(net, "backbone", None), "default_cfg", {"input_size": (3, 32, 32)})
    with pytest.raises((ValueError, TypeError), match=why):
        explain_pair(net, two(*config["input_size"][1:]))
    assert all(module.training for module in net.modules())


def test_the_net_is_left_as_it_was():
    net = make("test_resnet").train().freeze_backbone(batch_norm="eval")
    next(net.backbone.parameters()).requires_grad_(True)
    images = two(64, 64).requires_grad_()
    net(images.repeat(2, 1, 1, 1), torch.tensor([0, 1, 0, 1])).logits_self.sum().backward()

    def look():
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        return net.state_dict(), gradients, [module.training for module in net.modules()], torch.get_rng_state()

    before = copy.deepcopy(look())
    assert len(set(before[2])) == 2
    in_train_mode = explain_pair(net, images)
    torch.testing.assert_close(look(), before, rtol=0, atol=0)
    assert torch.is_grad_enabled()
    torch.testing.assert_close([*explain_pair(net.eval(), images)], [*in_train_mode], rtol=0, atol=0)


def test_idle_channels_are_cold():
    net = make(Tiny()).eval()
    nn.init.zeros_(net.backbone.conv.weight)
    assert explain_pair(net, two(16, 16), top_k=6).heatmaps.eq(0).all()
