"""Scores of a net on its test images: top-1, top-5, and how its errors are spread over families of classes."""

from collections import Counter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from workbench.images import to_device


def predict(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N,C] and labels [N] of the images of all processes' loaders, on the CPU; leaves the net in eval mode."""
    net.eval()
    logits, labels = [], []
    bar = tqdm(loader, desc="testing", leave=False, disable=not PartialState().is_main_process)
    with torch.inference_mode():  # not around what follows: older releases of torch gather nothing in it
        for images, targets, _ in bar:
            logits.append(net(to_device(images, device)).float())
            labels.append(targets)
    parts = gather_object([(torch.cat(logits).cpu(), torch.cat(labels))])
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent."""
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    return {"test_top1": float(top1), "test_top5": float(top5)}


def confusion(logits: Tensor, labels: Tensor, classes: list[str], families: list[str]) -> dict[str, Any]:
    """How the errors are spread: within a family (terns taken for terns), across families, and between which classes.

    `families_by_chance` is the share of errors that would fall within families if every wrong class were as likely.
    With no families, each class is a family of its own.
    """
    families = families or [str(label) for label in range(len(classes))]
    predicted = logits.argmax(1)
    errors = Counter(
        (label, guess) for label, guess in zip(labels.tolist(), predicted.tolist(), strict=True) if label != guess
    )
    within = sum(count for (a, b), count in errors.items() if families[a] == families[b])
    siblings = torch.tensor([families.count(name) - 1.0 for name in families])
    wrong = labels[predicted != labels]
    return {
        "images": len(labels),
        "errors": sum(errors.values()),
        "errors_within_families": within,
        "errors_across_families": sum(errors.values()) - within,
        "families_by_chance": float((siblings[wrong] / (len(classes) - 1)).mean()) if len(wrong) else 0.0,
        "most_confused": [
            {"true": classes[a], "predicted": classes[b], "images": count} for (a, b), count in errors.most_common(10)
        ],
    }


def report(found: dict[str, Any]) -> str:
    """The result as text for people."""
    errors = f"{found['errors']} errors"
    if found["families_by_chance"]:  # else there are none that could fall within a family
        errors += (
            f": {found['errors_within_families']} within a family, {found['errors_across_families']} across "
            f"(by chance {100 * found['families_by_chance']:.0f} % would fall within)"
        )
    lines = [
        f"top-1 {found['test_top1']:.2f} %, top-5 {found['test_top5']:.2f} % of {found['images']} images",
        errors,
        "most confused:",
    ]
    lines += [
        f"  {pair['images']:4d} x {pair['true']} taken for {pair['predicted']}" for pair in found["most_confused"]
    ]
    return "\n".join(lines)
