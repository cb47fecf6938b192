"""What to train with, from the size of the data, each choice with its reason."""

from typing import Any


def choose(n_images: int, n_classes: int) -> dict[str, tuple[Any, str]]:
    """Name of a flag: its value, why."""
    classes = min(n_classes, 8)
    batches = max(1, n_images // (classes * 4))
    return {
        "backbone": ("resnet18", "small enough for few images")
        if n_images < 2000
        else ("resnet50", "2,000 images or more"),
        "image_size": (224, "the size that timm's ResNets were trained at"),
        "n_classes": (classes, f"up to 8 classes a batch, of {n_classes}"),
        "n_samples": (4, "as in the paper, three partners of its class for each image"),
        "epochs": (
            max(10, min(100, round(2000 / batches))),
            f"about 2,000 steps of {batches} an epoch, 10 to 100 epochs",
        ),
        "lr": (3e-4, "usual for AdamW"),
    }
