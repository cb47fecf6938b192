"""Score a trained model: top-1, top-5, and what it confuses within and across families.

python examples/score.py runs/birds-api-resnet10t-seed0/best
torchrun --nproc_per_node=2 examples/score.py runs/birds-api-resnet10t-seed0/best   # on two GPUs
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from workbench.datasets.bad_images import ending_at_bad_images
from workbench.datasets.birds_cache import open_data
from workbench.distributed import first_process_first, join_processes, share
from workbench.images import ImageDataset, ImageSet, test_transform
from workbench.run_folder import load_model, write_text
from workbench.settings import Settings


def predict(net: nn.Module, loader: DataLoader[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits [N,C] and labels [N] of the images of all processes' loaders, on the CPU; leaves the net in eval mode."""
    net.eval()
    logits, labels = [], []
    bar = tqdm(loader, desc="testing", leave=False, disable=not PartialState().is_main_process)
    with torch.inference_mode():  # not around what follows: older releases of torch gather nothing in it
        for images, targets, _ in bar:
            logits.append(net(images.to(device, memory_format=torch.channels_last)).float())
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


def test_loader(data: ImageSet, settings: Settings) -> DataLoader[Any]:
    """This process's share of the test images, in order, prepared as `settings` say."""
    transform = test_transform(settings.resize, settings.crop)
    images = ImageDataset(share(data.test), transform, resize=settings.resize, cache=settings.cache_images)
    return DataLoader(
        images, batch_size=settings.eval_batch, num_workers=settings.workers,
        timeout=settings.loader_timeout if settings.workers else 0,
    )  # fmt: skip


test_loader.__test__ = False  # type: ignore[attr-defined]  # else pytest runs it where a test imports it


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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder of a run, such as RUN/best or RUN/last")
    parser.add_argument("--data", help="folder of the same data set (default: the data of the training)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    options = parser.parse_args(arguments)

    processes = join_processes(options.device)
    with first_process_first():
        net, run = load_model(options.model)
        settings = Settings(**run["settings"])
        data = open_data(settings, options.data)
        if data.classes != run["classes"]:
            raise SystemExit(f"{data.name} has other classes than {options.model} was trained on: give its --data")
    device = torch.device(options.device)
    with ending_at_bad_images():
        logits, labels = predict(net.to(device), test_loader(data, settings), device)
    found = {**scores(logits, labels), **confusion(logits, labels, data.classes, data.families)}
    if processes.is_main_process:
        print(report(found))
        if options.json:
            write_text(options.json, json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
