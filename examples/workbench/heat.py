"""Heat maps over images, refused if the last feature map is too coarse to localise anything."""

import matplotlib
import numpy as np
import torch
from torch import Tensor

from apinet_head import APINet
from apinet_head.explain import features_and_maps

LEAST = 4  # cells a side: a map of 2 x 2 only tells left from right, and looks as if it told more


def map_size(net: APINet, images: Tensor) -> tuple[int, int]:
    """Height and width of the last feature map of images [B,3,H,W]; a ValueError if it is coarse or there is none."""
    with torch.no_grad():
        height, width = features_and_maps(net.eval().backbone, images[:1])[1].shape[-2:]
    if min(height, width) < LEAST:
        sides = [LEAST * -(-side // cells) for side, cells in zip(images.shape[-2:], (height, width), strict=True)]
        raise ValueError(
            f"the last feature map is {height} x {width} for images of {images.shape[-2]} x {images.shape[-1]} pixels, "
            f"too coarse for heat maps, which need {LEAST} x {LEAST}: train with images of {max(sides)} x {max(sides)} "
            "pixels or more, or with a backbone whose last map is finer, such as a ResNet with output_stride=8 "
            "in its backbone_args"
        )
    return height, width


def about_map(size: tuple[int, int], images: Tensor) -> str:
    """The resolution of the heat maps, as a sentence."""
    cell = " x ".join(str(round(side / cells)) for side, cells in zip(images.shape[-2:], size, strict=True))
    about = f"each of its values stands for about {cell} pixels, and nothing smaller can be told apart."
    return f"The heat maps are enlarged from a feature map of {size[0]} x {size[1]}: {about}"


def overlay(pixels: Tensor, heat: Tensor | None) -> np.ndarray:
    """An image [3,H,W] in [0, 1], in grey below the colours of `heat` [H,W] in [0, 1], as [H,W,3] in [0, 1]."""
    image = pixels.cpu().permute(1, 2, 0).numpy()
    if heat is None:
        return image
    heated = heat.cpu().numpy()
    share = 0.7 * heated[..., None]  # of the colours: none where there is no heat
    grey = image.mean(2, keepdims=True) * 0.75 + 0.2
    return (1 - share) * grey + share * matplotlib.colormaps["turbo"](heated)[..., :3]
