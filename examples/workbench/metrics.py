"""Figures of a trained net by class, from what it took its test images for."""

import math
import os
import platform
import re
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from apinet_head import __version__


def confusions(labels: list[int], predicted: list[int], classes: int) -> Tensor:
    """[C,C]: how many images of the row's class were taken for the column's."""
    pairs = torch.tensor(labels) * classes + torch.tensor(predicted)
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def summary(confusion: Tensor) -> dict[str, Any]:
    """Accuracy with Wilson's interval of 95 %, the mean of the classes' accuracies, and that of a constant answer."""
    of_class, right = confusion.sum(1), confusion.diagonal()
    total, correct = int(of_class.sum()), int(right.sum())
    tested = of_class > 0
    return {
        "accuracy": correct / total,
        "accuracy_interval": interval(correct, total),
        "mean_class_accuracy": (right[tested] / of_class[tested]).mean().item(),
        "largest_class_share": int(of_class.max()) / total,
        "test_images": total,
        "right": correct,
    }


def interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share: where it lies if the images are independent draws."""
    share, scale = correct / total, 1 + z**2 / total
    middle = (share + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def by_class(classes: list[str], train_labels: list[int], confusion: Tensor) -> list[dict[str, Any]]:
    """A row for each class, worst first, those without test images last."""
    train = Counter(train_labels)
    rows = []
    for row, name in enumerate(classes):
        counts = confusion[row].clone()
        total, right = int(counts.sum()), int(counts[row])
        counts[row] = 0
        other = int(counts.argmax())
        rows.append(
            {
                "class": name,
                "train_images": train[row],
                "test_images": total,
                "right": right,
                "accuracy": right / total if total else None,
                "taken_for": classes[other] if counts[other] else None,
                "taken_for_count": int(counts[other]),
            }
        )
    return sorted(rows, key=lambda each: (each["accuracy"] is None, each["accuracy"], each["class"]))


def ranked_pairs(confusion: Tensor) -> list[tuple[int, int, int, int]]:
    """Pairs of classes (a, b, images of a taken for b, images of b taken for a), the most confused first.

    Of the two classes, a is the one that was mistaken more often.
    """
    found = []
    for a, b in (confusion + confusion.T).triu(1).nonzero().tolist():
        there, back = int(confusion[a, b]), int(confusion[b, a])
        found.append((a, b, there, back) if there >= back else (b, a, back, there))
    return sorted(found, key=lambda pair: (-pair[2] - pair[3], pair))


def machine(device: str) -> str:
    """What the training ran on."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
        name = f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores" + (
            "" if device == "cpu" else f", {device}"
        )
    return (
        f"{name}; {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"timm {timm.__version__}, apinet-head {__version__}; {date.today()}"
    )
