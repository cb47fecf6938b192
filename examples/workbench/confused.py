"""The most confused pairs of classes, each with a wrong image, and what the net looks at when it compares it."""

from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apinet_head import APINet, explain_pair
from workbench.metrics import confusions, ranked_pairs
from workbench.own_training import Images

PAIRS = 6  # pairs of classes with pictures
CANDIDATES = 32  # training images of a class, of which the most alike is shown
CHANNELS = 5  # whose heat maps are averaged


class Picture(NamedTuple):
    """An image as the net sees it [3,H,W] in [0, 1], and its heat map [H,W] if there is one."""

    pixels: Tensor
    heat: Tensor | None
    file: str
    caption: str


class Confused(NamedTuple):
    """Two classes: images of the first taken for the second, and the other way round."""

    true: str
    predicted: str
    there: int
    back: int
    pictures: list[Picture]


class Shown(NamedTuple):
    """All confused pairs, pictures for the first `PAIRS`, and what is to be said of the heat maps."""

    pairs: list[Confused]
    note: str


def show_pairs(net: APINet, train: Images, test: Images, likely: Tensor, options: Namespace) -> Shown:
    """`likely` [N,C]: the probabilities of the test images; `train` has its images transformed as those of the test."""
    classes = likely.shape[1]
    names = {label: item.label for label, item in zip(train.labels, train.items, strict=True)}
    labels, predicted = torch.tensor(test.labels), likely.argmax(1)
    found, note = [], _about_heat(options.baseline)
    for a, b, there, back in ranked_pairs(confusions(test.labels, predicted.tolist(), classes)):
        pictures: list[Picture] = []
        if len(found) < PAIRS:
            wrong = ((labels == a) & (predicted == b)).nonzero()[:, 0]
            row = int(wrong[likely[wrong, b].argmax()])
            pictures, refusal = _pictures(net, train, test, row, (b, a), float(likely[row, b]), options.baseline)
            note = refusal or note
        found.append(Confused(names[a], names[b], there, back, pictures))
    return Shown(found, note)


@torch.no_grad()
def _pictures(
    net: APINet, train: Images, test: Images, row: int, labels: tuple[int, int], probability: float, baseline: bool
) -> tuple[list[Picture], str]:
    """The wrong image, and beside it the most alike training image of the predicted class and of the true one.

    The two are compared with the wrong one; that has the heat map of the comparison with the predicted class.
    """
    image = test[row][0]
    alike = [_most_alike(net, train, image, label) for label in labels]
    others = [train[index][0] for index in alike]
    heats: list[Tensor | None] = [None] * 3
    refusal = ""
    try:
        seen = [explain_pair(net, torch.stack([image, other]), top_k=min(CHANNELS, net.dim)) for other in others]
        maps = [_mean_heat(each.plain_heatmaps if baseline else each.heatmaps) for each in seen]
        heats = [maps[0][0], maps[0][1], maps[1][1]]
    except ValueError as error:  # the backbone has no map whose channels are those of the gates
        refusal = f"There are no heat maps with this backbone: {error}."
    predicted, true = (train.items[index].label for index in alike)
    captions = [
        f"{true}, taken for {predicted} ({probability:.0%})",
        f"{predicted}, in training",
        f"{true}, in training",
    ]
    items = [test.items[row], *(train.items[index] for index in alike)]
    pixels = [_pixels(test, each) for each in (image, *others)]
    found = zip(pixels, heats, items, captions, strict=True)
    return [Picture(each, heat, item.path.name, caption) for each, heat, item, caption in found], refusal


def _most_alike(net: APINet, train: Images, image: Tensor, label: int) -> int:
    """By the cosine of the features, among the first images of the class."""
    rows = [row for row, other in enumerate(train.labels) if other == label][:CANDIDATES]
    features = net.backbone(torch.stack([image, *(train[row][0] for row in rows)]))
    return rows[int(F.cosine_similarity(features[:1], features[1:]).argmax())]


def _mean_heat(heatmaps: Tensor) -> Tensor:
    """[2,H,W] in [0, 1] of [2,k,H,W]: from the least to the largest value of the mean, as each channel is scaled."""
    mean = heatmaps.mean(1)
    least, largest = mean.amin((1, 2), keepdim=True), mean.amax((1, 2), keepdim=True)
    return (mean - least) / (largest - least).clamp(min=1e-6)


def _pixels(images: Images, image: Tensor) -> Tensor:
    """As it was before timm's last transform, which normalises."""
    normalize = images.transform.transforms[-1]
    mean, std = (torch.as_tensor(values).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    return (image * std + mean).clamp(0, 1)


def _about_heat(baseline: bool) -> str:
    which = (
        f"the {CHANNELS} most active channels, for the baseline has no trained gates"
        if baseline
        else f"the {CHANNELS} channels that its gates open most: the training images compared with the wrong one, and "
        "the wrong one with that of the class it was taken for"
    )
    return f"The colours, from blue to red, show where in an image its features are active, as the mean over {which}."
