"""Defaults of a training, chosen from the size of the data and the device, each with its reason."""

from typing import Any, NamedTuple


class Known(NamedTuple):
    """What the defaults depend on."""

    images: int  # in training
    classes: int
    typical: int  # images of the median class
    side: int  # the median of the images' shorter sides, in pixels
    pretrained: bool
    gpu: bool
    frozen: bool = False  # the head is trained alone


def choose(known: Known) -> dict[str, tuple[Any, str]]:
    """{flag: (value, reason)}; `image_size` is for a backbone that takes any size."""
    many = known.images >= 2000
    total = 64 if many else 32
    n_classes = min(known.classes, total // 4)  # four images of each in the paper
    # More images of few classes, but not more than a typical class has: an image would be its own partner.
    n_samples = max(4, min(total // n_classes, known.typical))
    batches = max(1, known.images // (n_classes * n_samples))
    steps = 400 if known.frozen else 2000
    epochs = max(10, min(100, round(steps / batches)))
    if many and known.gpu:
        backbone = "resnet50", "for 2,000 images or more"
    else:
        backbone = "resnet18", f"small enough for {'a machine without GPU' if many else 'fewer than 2,000 images'}"
    if known.side >= 224:
        why = "usual for pretrained backbones; more, such as the paper's 448, shows finer details and costs more"
        image_size = 224, why
    else:
        # At least 64: a ResNet's last feature map is 32 times smaller than the image.
        size = max(64, -(-known.side // 32) * 32)
        image_size = size, f"the images' median shorter side is {known.side} pixels; a multiple of 32, at least 64"
    if known.frozen:
        lr = 0.01, "chosen on validation images of photographs and of drawn birds, see docs/settings.md"
    elif known.pretrained:
        lr = 3e-4, "usual for AdamW with pretrained weights"
    else:
        lr = 1e-3, "usual for AdamW from scratch"
    return {
        "backbone": backbone,
        "image_size": image_size,
        "n_classes": (n_classes, f"classes in a batch, of {known.classes}"),
        "n_samples": (n_samples, f"images of each of these, the median class having {known.typical}"),
        "epochs": (epochs, f"about {steps:,} steps, {batches} an epoch, but 10 to 100 epochs"),
        "lr": lr,
    }
