"""explain_pair: the channels that it names, where its heat maps are hot, and that it leaves the net as it was."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from stand_ins import LoRA, StoredIn8Bits
from torch import nn

from apinet_head import APINet, ChunkedBackbone, Pairs
from apinet_head.explain import explain_pair, features_and_maps


class Tiny(nn.Module):
    """A backbone of one convolution; its map is a fourth of the image, in NCHW, NHWC or as tokens."""

    num_features = 6

    def __init__(self, layout="NCHW", prefix=0, reduction=4):
        super().__init__()
        self.layout, self.num_prefix_tokens = layout, prefix
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        if layout == "NHWC":
            self.output_fmt = "NHWC"
        if layout == "tokens":
            self.feature_info = [{"reduction": reduction}]

    def grid(self, images):
        return self.drop(self.norm(self.conv(images)))

    def forward_features(self, images):
        maps = self.grid(images)
        if self.layout == "NHWC":
            return maps.permute(0, 2, 3, 1)
        if self.layout == "tokens":
            return F.pad(maps.flatten(2).transpose(1, 2), (0, 0, self.num_prefix_tokens, 0), value=100.0)
        return maps

    def forward(self, images):
        return self.grid(images).mean((2, 3))


class Flat(nn.Module):
    """A backbone of one Linear on each pixel."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward_features(self, images):
        return self.linear(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, images):
        return self.forward_features(images).mean((2, 3))


def two(*size, seed=0):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def make(backbone, **args):
    torch.manual_seed(0)
    net = APINet(backbone() if isinstance(backbone, type) else backbone, 3, backbone_args=args or None)
    with torch.no_grad():  # gates far enough apart to be told from rounding
        net.head.mutual.fc2.weight.mul_(20)
    return net


def expected_maps(maps, channels, size):
    """By the definition: enlarge one channel, subtract its least value, divide by the largest that is left."""
    rows = []
    for image, chosen in enumerate(channels.tolist()):
        for channel in chosen:
            heat = F.interpolate(maps[image : image + 1, channel : channel + 1], size, mode="bilinear")[0, 0]
            heat = heat - heat.min()
            rows.append(heat / heat.max())
    return torch.stack(rows).unflatten(0, channels.shape)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
@pytest.mark.parametrize("size", [(24, 24), (16, 32)])
def test_heat_maps_are_the_channels_of_the_map(layout, size):
    torch.manual_seed(1)
    net = make(Tiny(layout, prefix=3 if layout == "tokens" else 0)).eval()
    images = two(*size)
    seen = explain_pair(net, images, top_k=4)
    with torch.no_grad():
        maps = net.backbone.grid(images)
    torch.testing.assert_close(seen.heatmaps, expected_maps(maps, seen.channels, size))
    torch.testing.assert_close(seen.plain_heatmaps, expected_maps(maps, seen.plain_channels, size))
    assert seen.plain_channels.tolist() == maps.mean((2, 3)).topk(4).indices.tolist()
    one, other = maps.mean((2, 3))
    assert seen.similarity.shape == ()
    torch.testing.assert_close(seen.similarity, one @ other / one.norm() / other.norm())


def quantize_dynamically(net):
    quantization = pytest.importorskip("torch.ao.quantization", reason="moved to torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(net, {nn.Linear})


class Whitened(Tiny):
    """Computes in bfloat16, takes and gives float32, and has a float64 parameter in front."""

    def __init__(self):
        super().__init__()
        self.bfloat16().mean = nn.Parameter(torch.zeros(3, 1, 1, dtype=torch.float64))

    def grid(self, images):
        return super().grid((images - self.mean).bfloat16()).float()


def replaced_by(make):
    def change(net):
        for name, module in [*net.named_modules()]:
            if isinstance(module, nn.Linear):
                net.set_submodule(name, make(module))
        return net

    return change


@pytest.mark.parametrize(
    "change",
    [quantize_dynamically, replaced_by(StoredIn8Bits), replaced_by(LoRA)],
    ids=["dynamic", "int8", "adapter"],
)
def test_replaced_linears_are_explained_as_they_compute(change):
    torch.manual_seed(3)
    net = change(APINet("test_vit", 3, backbone_args={"img_size": 64})).eval()
    images = two(64, 64)
    seen = check(net, images)
    with torch.no_grad():
        first, second = net.backbone(images)
        mutual = net.head.mutual.fc2(net.head.mutual.fc1(torch.cat([first, second])[None]))[0]
    torch.testing.assert_close(seen.gates, torch.sigmoid(mutual * torch.stack([first, second])))


NETS = {
    "chunks": lambda: APINet(ChunkedBackbone(Tiny(), 1), 3, dim=6),
    "no float parameters": lambda: quantize_dynamically(APINet(Flat(), 3, dim=4)),
    "converts the images": lambda: APINet(Whitened(), 3, dim=6),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_nets_that_are_not_of_one_dtype_or_in_chunks_are_explained(make):
    check(make(), two(16, 16))


def test_a_net_in_half_precision_is_explained():
    check(make(Tiny).bfloat16(), two(16, 16).bfloat16())


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        lambda backbone: ChunkedBackbone(compiled(backbone), 1),
        lambda backbone: compiled(ChunkedBackbone(backbone, 1)),
    ],
)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "tokens"])
def test_compiled_backbones_are_explained_as_plain_ones(wrap, layout):
    net, images = make(Tiny(layout)).eval(), two(16, 16)
    expected = explain_pair(net, images)
    net.backbone = wrap(net.backbone)
    torch.testing.assert_close(explain_pair(net, images), [*expected])


def test_a_net_under_ddp_is_an_error_that_points_to_module():
    wrapped = nn.Module()
    wrapped.module = make(Tiny)
    with pytest.raises(TypeError, match=r"must be an APINet, got Module: pass its \.module"):
        explain_pair(wrapped, two(16, 16))


@pytest.mark.parametrize("head", [{}, {"gate": "single"}, {"mutual": "individual"}])
def test_channels_are_those_of_the_largest_gates(head):
    torch.manual_seed(2)
    net = APINet("test_resnet", 3, **head).eval()
    images = two(64, 64)
    seen = explain_pair(net, images, top_k=7)
    pair = Pairs(torch.tensor([0]), torch.tensor([1]), torch.tensor([False]), torch.tensor([True]))
    with torch.no_grad():
        first, second = net.head.gates(net.backbone(images), pair)
    torch.testing.assert_close(seen.gates, torch.stack([first[0], second[0]]))
    for gates, channels in zip(seen.gates, seen.channels, strict=True):
        order = sorted(range(net.dim), key=lambda channel: (-gates[channel].item(), channel))
        assert channels.tolist() == order[:7]


MODELS = {
    "resnet18": (64, 64), "test_resnet": (64, 96), "test_vit": (160, 160), "test_vit2": (160, 160),
    "test_vit4": (160, 160), "test_convnext": (64, 96), "test_efficientnet": (64, 96), "test_nfnet": (64, 64),
    "levit_128s": (224, 224), "pvt_v2_b0": (64, 64), "efficientformer_l1": (224, 224),
    "mobilenetv2_035": (64, 64), "swin_tiny_patch4_window7_224": (224, 224),
}  # fmt: skip
NEWEST = Version(timm.__version__) >= Version("1.0.27")  # before, some models told less of their last map
if NEWEST:
    MODELS["coat_lite_tiny"] = (224, 224)


def check(net, images, top_k=3):
    seen = explain_pair(net, images, top_k=top_k)
    assert seen.gates.shape == (2, net.dim)
    assert 0 <= seen.gates.min() <= seen.gates.max() <= 1
    for channels, maps in ((seen.channels, seen.heatmaps), (seen.plain_channels, seen.plain_heatmaps)):
        assert channels.dtype == torch.int64
        assert channels.shape == (2, top_k)
        assert all(len(set(row)) == top_k for row in channels.tolist())
        assert maps.shape == (2, top_k, *images.shape[-2:])
        assert maps.min() == 0
        assert set(maps.amax((2, 3)).unique().tolist()) <= {0, 1}  # 0: a channel that is the same everywhere
    assert not any(isinstance(field, torch.Tensor) and field.requires_grad for field in seen)
    return seen


@pytest.mark.parametrize(("model", "size"), MODELS.items(), ids=MODELS)
def test_architectures_of_timm_are_explained(model, size):
    check(make(model), two(*size))


@pytest.mark.parametrize("model", ["resnet18", "test_vit2", "test_convnext", "test_efficientnet", "pvt_v2_b0"])
def test_the_map_is_what_was_pooled(model):
    # Average pooling and at most a norm lie between the two, so that a channel mix-up would show.
    net = make(model).eval()
    images = two(160, 160)
    with torch.no_grad():
        features, maps = features_and_maps(net.backbone, images)
    assert torch.corrcoef(torch.stack([features[0], maps.mean((2, 3))[0]]))[0, 1] > 0.99


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_vit_drops_prefix_tokens_and_folds_patches_as_timm_does(prefix):
    net = make("test_vit", dynamic_img_size=True, **prefix).eval()
    images = two(64, 96)
    check(net, images)
    with torch.no_grad():
        maps = features_and_maps(net.backbone, images)[1]
        folded = net.backbone.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[0]
    assert maps.shape == (2, 64, 4, 6)
    torch.testing.assert_close(maps, folded)


class Hidden(Tiny):
    """Has another layer after its map."""

    def __init__(self):
        super().__init__()
        self.pre_logits = nn.Sequential(nn.Linear(6, 6))

    def forward(self, images):
        return self.pre_logits(super().forward(images))


def of_no_grid():
    backbone = Tiny("tokens")
    del backbone.feature_info
    return make(backbone)


REFUSED = {
    "MobileNetV3": (
        lambda: make("mobilenetv3_small_050"),
        "1024 channels of the features of MobileNetV3 are not the 288 of its last",
    ),
    "hidden layer": (lambda: make("test_mambaout"), r"hidden layer \(head.pre_logits\) after its feature map"),
    "quantised hidden layer": (lambda: quantize_dynamically(make(Hidden)), r"hidden layer \(pre_logits\)"),
    "pooled by attention": (lambda: make("test_vit3"), r"pools by attention.*global_pool"),
    "one token": (
        lambda: make("pit_ti_224"),
        f"returns 1 tokens.*do not form a grid of {'7 x 7' if NEWEST else '8 x 8'} patches",
    ),
    "unknown grid": (of_no_grid, "grid is unknown"),
    "another grid": (lambda: make(Tiny("tokens", reduction=8)), "do not form a grid of 4 x 4 patches"),
    "several maps": (lambda: make("crossvit_9_240"), "must return one map.*got list"),
    "no forward_features": (
        lambda: APINet(nn.Sequential(nn.Flatten(), nn.Linear(3072, 6)), 3, dim=6),
        r"Sequential has no forward_features\(images\)",
    ),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_models_whose_gates_have_no_map_are_refused(make, why):
    net = make().train()
    size = getattr(net.backbone, "default_cfg", {"input_size": (3, 32, 32)})["input_size"][1:]
    with pytest.raises(ValueError, match=why):
        explain_pair(net, two(*size))
    assert all(module.training for module in net.modules())


def test_the_net_is_left_as_it_was():
    net = make("test_resnet").train().freeze_backbone(batch_norm="eval")
    next(net.backbone.parameters()).requires_grad_(True)
    images = two(64, 64).requires_grad_()
    net(images.repeat(2, 1, 1, 1), torch.tensor([0, 1, 0, 1])).logits_self.sum().backward()

    def look():
        state = {name: value.clone() for name, value in net.state_dict().items()}
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        return state, gradients, [module.training for module in net.modules()], torch.get_rng_state()

    before = look()
    assert len(set(before[2])) == 2
    in_train_mode = explain_pair(net, images)
    torch.testing.assert_close(look(), before, rtol=0, atol=0)
    assert torch.is_grad_enabled()
    torch.testing.assert_close([*explain_pair(net.eval(), images)], [*in_train_mode], rtol=0, atol=0)


def test_idle_channels_are_cold_and_ties_go_to_the_lowest():
    net = make(Tiny).eval()
    with torch.no_grad():
        net.backbone.conv.weight.zero_()
    seen = explain_pair(net, two(16, 16), top_k=6)
    assert seen.heatmaps.eq(0).all()
    with torch.no_grad():
        net.head.mutual.fc2.weight.zero_()
        net.head.mutual.fc2.bias.zero_()
    assert explain_pair(net, two(16, 16), top_k=6).channels.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
