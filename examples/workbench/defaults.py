"""What to train with, from the size of the data and the machine, each choice with its reason."""

from typing import Any, NamedTuple


class Known(NamedTuple):
    """What the choices are made from.

    Attributes:
        images: in training.
        classes: number of them.
        typical: images of the median class.
        side: the median of the images' shorter sides, in pixels.
        pretrained: whether the backbone's weights are learned before.
        gpu: whether there is one.
        frozen: whether the head is trained alone.
    """

    images: int
    classes: int
    typical: int
    side: int
    pretrained: bool
    gpu: bool
    frozen: bool = False


Choice = tuple[Any, str]


def choose(known: Known) -> dict[str, Choice]:
    """Name of a flag: its value, why. `image_size` is for a backbone that takes any."""
    n_classes, n_samples = batch(known)
    batches = max(1, known.images // (n_classes * n_samples))
    steps = 400 if known.frozen else 2000
    return {
        "backbone": backbone(known),
        "image_size": image_size(known),
        "n_classes": (n_classes, f"classes in a batch, of {known.classes}"),
        "n_samples": (n_samples, f"images of each of these, the median class having {known.typical}"),
        "epochs": (
            max(10, min(100, round(steps / batches))),
            f"about {steps:,} steps, {batches} an epoch, but 10 to 100 epochs",
        ),
        "lr": learning_rate(known),
    }


def learning_rate(known: Known) -> Choice:
    if known.frozen:
        return 0.01, "chosen on validation images of photographs and of drawn birds, see docs/settings.md"
    if known.pretrained:
        return 3e-4, "usual for AdamW with pretrained weights"
    return 1e-3, "usual for AdamW from scratch"


def backbone(known: Known) -> Choice:
    if known.images < 2000:
        return "resnet18", "small enough for fewer than 2,000 images"
    if not known.gpu:
        return "resnet18", "small enough for a machine without GPU"
    return "resnet50", "for 2,000 images or more"


def image_size(known: Known) -> Choice:
    if known.side >= 224:
        return 224, "usual for pretrained backbones; more, as the paper's 448, tells finer details and costs more"
    # 64: a ResNet's last map is 32 times smaller than the image, and one with a single place has no heat map.
    size = max(64, -(-known.side // 32) * 32)
    return size, f"the images' median shorter side is {known.side} pixels; a multiple of 32, at least 64"


def batch(known: Known) -> tuple[int, int]:
    """About 32 images, or 64 of 2,000 or more: how many classes, and images of each, which are four in the paper.

    Few classes take more of each instead, though not more than a usual class has: an image's partner would be itself.
    """
    total = 32 if known.images < 2000 else 64
    classes = min(known.classes, total // 4)
    return classes, max(4, min(total // classes, known.typical))
