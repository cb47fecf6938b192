"""Metrics of a trained net: predictions and scores on the test images, and its errors by class and by family."""

from collections import Counter
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy.stats import binomtest
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from workbench.images import to_device


def predict(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N,C] and labels [N] of all processes' images, on the CPU; leaves the net in eval mode."""
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
    """The errors within families (terns taken for terns), across families, and of the most confused classes.

    `families_by_chance` is the share of errors that would fall within families if all wrong classes were equally
    likely. Without families, each class is its own family.
    """
    families = families or [str(label) for label in range(len(classes))]
    predicted = logits.argmax(1)
    wrong = predicted != labels
    errors = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    within = sum(count for (a, b), count in errors.items() if families[a] == families[b])
    siblings = torch.tensor([families.count(name) - 1.0 for name in families])
    return {
        "images": len(labels),
        "errors": errors.total(),
        "errors_within_families": within,
        "errors_across_families": errors.total() - within,
        "families_by_chance": float((siblings[labels[wrong]] / (len(classes) - 1)).mean()) if errors else 0.0,
        "most_confused": [
            {"true": classes[a], "predicted": classes[b], "images": count} for (a, b), count in errors.most_common(10)
        ],
    }


def report(found: dict[str, Any]) -> str:
    errors = f"{found['errors']} errors"
    if found["families_by_chance"]:  # else there are none that could fall within a family
        errors += f": {found['errors_within_families']} within a family, {found['errors_across_families']} across "
        errors += f"(by chance {100 * found['families_by_chance']:.0f} % would fall within)"
    scored = f"top-1 {found['test_top1']:.2f} %, top-5 {found['test_top5']:.2f} % of {found['images']} images"
    pairs = [f"  {each['images']:4d} x {each['true']} taken for {each['predicted']}" for each in found["most_confused"]]
    return "\n".join([scored, errors, "most confused:", *pairs])


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
        "accuracy_interval": tuple(binomtest(correct, total).proportion_ci(method="wilson")),  # as if drawn one by one
        "mean_class_accuracy": (right[tested] / of_class[tested]).mean().item(),
        "largest_class_share": int(of_class.max()) / total,
        "test_images": total,
        "right": correct,
    }


def by_class(classes: list[str], train_labels: list[int], confusion: Tensor) -> list[dict[str, Any]]:
    """A row for each class, worst first, those without test images last."""
    train = Counter(train_labels)
    rows = []
    for row, (name, counts) in enumerate(zip(classes, confusion.tolist(), strict=True)):
        total, right = sum(counts), counts[row]
        counts[row] = 0
        other = counts.index(max(counts))
        rows.append(
            {
                "class": name,
                "train_images": train[row],
                "test_images": total,
                "right": right,
                "accuracy": right / total if total else None,
                "taken_for": classes[other] if counts[other] else None,
                "taken_for_count": counts[other],
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
