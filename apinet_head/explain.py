"""The channels with the largest gates for a pair of images, and heat maps of those channels."""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apinet_head._checks import check_int, describe
from apinet_head.chunked import ChunkedBackbone
from apinet_head.head import APIHead
from apinet_head.model import APINet
from apinet_head.pairs import Pairs


class PairExplanation(NamedTuple):
    """The gates of two images, and the k channels chosen by them, largest first.

    Attributes:
        gates: [2,D], in (0, 1).
        channels: [2,k] int64, those with the largest gates.
        heatmaps: [2,k,H,W] in [0, 1], where in the image each of `channels` is active.
        plain_channels: [2,k] int64, those with the largest pooled activations, regardless of gates.
        plain_heatmaps: [2,k,H,W] in [0, 1], of `plain_channels`.
        similarity: scalar, cosine of the two features.
    """

    gates: Tensor
    channels: Tensor
    heatmaps: Tensor
    plain_channels: Tensor
    plain_heatmaps: Tensor
    similarity: Tensor


def explain_pair(net: APINet, images: Tensor, *, top_k: int = 5) -> PairExplanation:
    """The channels with the largest gates for two images, and where in the images these are active.

    As in the paper's section "Visualization". A gate is one number per channel and does not change a map scaled to
    [0, 1]: `heatmaps` and `plain_heatmaps` differ in the choice of channels.

    The net runs in eval mode without gradients and is left unchanged. Its modules may be quantised, compiled or wrapped
    by adapters.

    Args:
        net: an `APINet` whose backbone pools a feature map, as nearly all of timm's do.
        images: [2,3,H,W], preprocessed as for training: anchor and partner.
        top_k: k, number of channels, at most D.

    Returns:
        A `PairExplanation`. Each heat map is scaled on its own from its minimum to its maximum; a constant one is 0.

    Raises:
        ValueError: images are not two, top_k is out of range, images and net differ in device or dtype, features are
            not finite, or the backbone has no feature map with the channels of the gates.
        TypeError: an argument has the wrong type.

    Examples:
        >>> import torch
        >>> from apinet_head import APINet
        >>> net = APINet("resnet18", num_classes=10)
        >>> seen = explain_pair(net, torch.randn(2, 3, 64, 64), top_k=3)
        >>> seen.channels.shape, seen.heatmaps.shape
        (torch.Size([2, 3]), torch.Size([2, 3, 64, 64]))
    """
    _check(net, images, top_k)
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad():  # not inference_mode, whose tensors autograd rejects
            net.eval()
            features, maps = features_and_maps(net.backbone, images)
            pair = Pairs(*(torch.tensor([value], device=images.device) for value in (0, 1, False, True)))
            gates = torch.cat(net.head.gates(features, pair))
    except (RuntimeError, ValueError) as error:
        # Checked afterwards, as a quantised net may accept other dtypes than its own.
        _check_placement(net, images, error)
        raise
    finally:
        for module, training in modes:  # parts of the net may be in different modes
            module.training = training
    if not (features.isfinite().all() and gates.isfinite().all()):
        raise ValueError(
            f"features or gates of the images, {describe(images)}, are not finite; check the images and the weights"
        )
    # A stable sort, unlike topk: the gates of all inactive channels are 1/2.
    channels, plain_channels = (
        values.sort(dim=1, descending=True, stable=True).indices[:, :top_k] for values in (gates, features)
    )
    return PairExplanation(
        gates=gates,
        channels=channels,
        heatmaps=heat_maps(maps, channels, images.shape[-2:]),
        plain_channels=plain_channels,
        plain_heatmaps=heat_maps(maps, plain_channels, images.shape[-2:]),
        similarity=F.cosine_similarity(features[0], features[1], dim=0),
    )


def _check(net: APINet, images: Tensor, top_k: int) -> None:
    if not isinstance(getattr(net, "head", None), APIHead):  # a compiled APINet has another type
        inner = getattr(getattr(net, "module", None), "head", None)
        advice = ": pass its .module" if isinstance(inner, APIHead) else ""
        raise TypeError(f"net must be an APINet, got {type(net).__name__}{advice}")
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [2, 3, H, W], got {type(images).__name__}")
    if images.ndim != 4 or len(images) != 2 or 0 in images.shape:
        raise ValueError(f"images must be two, [2, 3, H, W], of at least one pixel, got {describe(images)}")
    if not 1 <= check_int(top_k, "top_k") <= net.dim:
        raise ValueError(f"top_k must be from 1 to the {net.dim} channels of the features, got {top_k}")


def _check_placement(net: nn.Module, images: Tensor, error: Exception) -> None:
    """Raise ValueError if no tensor of the net has the device or the dtype of the images."""
    tensors = [*net.parameters(), *net.buffers()]
    devices = {tensor.device for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    for kind, own, known in (("device", images.device, devices), ("dtype", images.dtype, dtypes)):
        if known and own not in known:
            raise ValueError(
                f"images and the net must have the same {kind}, got {describe(images)} and a net of "
                f"{', '.join(sorted(map(str, known)))}"
            ) from error


def heat_maps(maps: Tensor, channels: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Channels [N,k] of feature maps [N,D,h,w], upsampled to `size` and scaled to [0, 1]."""
    rows = torch.arange(len(maps), device=maps.device)[:, None]
    chosen = maps[rows, channels].float()
    # Before upsampling, as scaling would amplify its rounding in a constant map.
    span = chosen.amax((2, 3), keepdim=True) - chosen.amin((2, 3), keepdim=True)
    varies = span > 1e-6 * chosen.abs().amax((2, 3), keepdim=True)
    large = F.interpolate(chosen, tuple(size), mode="bilinear", align_corners=False)
    # From the minimum, not from 0: after GELU or LayerNorm, inactive values are negative.
    large = large - large.amin((2, 3), keepdim=True)
    return torch.where(varies, large / large.amax((2, 3), keepdim=True), torch.zeros_like(large))


def features_and_maps(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features [B,D] of images [B,3,H,W], and the feature maps [B,D,h,w] that were pooled.

    Raises:
        ValueError: the backbone has no such maps; the message says why.
    """
    while hasattr(backbone, "_orig_mod") or isinstance(backbone, ChunkedBackbone):
        backbone = getattr(backbone, "_orig_mod", None) or cast(ChunkedBackbone, backbone).backbone
    name = type(backbone).__name__
    # timm's method for the last map. Features are not computed from it here, as a norm may follow the pooling.
    forward_features = getattr(backbone, "forward_features", None)
    if forward_features is None:
        raise ValueError(
            f"{name} has no forward_features(images) that returns the feature map before pooling, [B, D, h, w]: use a "
            "timm backbone, or add this method"
        )
    _refuse_mixed_channels(backbone)
    maps = forward_features(images)
    features: Tensor = backbone(images)
    if not isinstance(maps, Tensor) or maps.ndim not in (3, 4):
        raise ValueError(
            f"forward_features of {name} must return one map [B, D, h, w] or [B, tokens, D], got {describe(maps)}"
        )
    if maps.ndim == 3:
        maps = _fold_tokens(backbone, maps, images)
    elif getattr(backbone, "output_fmt", None) == "NHWC":
        maps = maps.permute(0, 3, 1, 2)
    if maps.shape[1] != features.shape[1]:
        raise ValueError(
            f"the {features.shape[1]} channels of the features of {name} are not the {maps.shape[1]} of its last "
            f"feature map: {MIXED}"
        )
    return features, maps


MIXED = (
    "a layer after the map mixes channels, so that a gate has no location in the image; use a backbone that pools "
    "last, such as resnet, convnext, efficientnet, vit or swin"
)


def _refuse_mixed_channels(backbone: nn.Module) -> None:
    """Raise ValueError for layers after the map that mix channels without changing their number."""
    if getattr(backbone, "attn_pool", None) is not None:
        raise ValueError(
            f"{type(backbone).__name__} pools by attention (see backbone_args={{'global_pool': 'avg'}}): {MIXED}"
        )
    for name, module in backbone.named_modules():
        # timm's name for a hidden layer before the classifier; a quantised one has a state, but no parameters.
        if name.rpartition(".")[2] == "pre_logits" and module.state_dict():
            raise ValueError(f"{type(backbone).__name__} has a hidden layer ({name}) after its feature map: {MIXED}")


def _fold_tokens(backbone: nn.Module, tokens: Tensor, images: Tensor) -> Tensor:
    """[B,T,D] as [B,D,h,w]: prefix tokens (class, registers) dropped, patches in rows.

    If the class token is the feature, no map was pooled, but its channels are those of the patches.
    """
    # Unlike patch_embed.grid_size, feature_info accounts for merged patches and other image sizes.
    try:
        reduction = backbone.feature_info[-1]["reduction"]  # type: ignore[index]
    except (AttributeError, IndexError, KeyError, TypeError):
        raise ValueError(
            f"forward_features of {type(backbone).__name__} returns tokens, and without a feature_info as in timm "
            "(its last item has 'reduction', the pixels per patch) their grid is unknown"
        ) from None
    height, width = (math.ceil(side / reduction) for side in images.shape[-2:])
    prefix = getattr(backbone, "num_prefix_tokens", None)
    if prefix is None:  # coat and volo have a class token, but no such attribute
        prefix = max(tokens.shape[1] - height * width, 0)
    patches = tokens[:, prefix:]
    if patches.shape[1] != height * width:
        raise ValueError(
            f"forward_features of {type(backbone).__name__} returns {tokens.shape[1]} tokens for {describe(images)}, "
            f"{prefix} of them prefix tokens: the others do not form a grid of {height} x {width} patches"
        )
    return patches.transpose(1, 2).reshape(len(patches), -1, height, width)
