"""The folder of a trained model: what is needed to use it, and what is known of it.

model.safetensors, config.json   the net, for APINet.from_pretrained
classes.json                     names by row of the logits, and how images are prepared (timm's create_transform)
metrics.json                     settings, data, machine, and the results on the test images
predictions.csv                  of each test image the true class, the predicted one and its probability
README.md                        the model card
report.html                      the results to look at
"""

import csv
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from apinet_head import APINet
from workbench.model_card import make_card
from workbench.own_training import Images


def check_free(folder: Path, overwrite: bool) -> None:
    """Before the training, not after it.

    Raises:
        SystemExit: the folder holds something that is not to be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--out {folder} is a file")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "classes.json").is_file():
        raise SystemExit(f"--out {folder} holds something else than a model of train_own.py: choose another folder")
    if not overwrite:
        raise SystemExit(f"--out {folder} holds a model: choose another folder, or write over it with --overwrite")


def save(folder: Path, net: APINet, config: dict[str, Any], about: dict[str, Any], metrics: dict[str, Any]) -> None:
    """All but the report and the predictions."""
    net.save_pretrained(folder, config=config)
    (folder / "classes.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(metrics) + "\n", encoding="utf-8")
    # save_pretrained writes a card that knows nothing of this model, and only where there is none.
    make_card(metrics).save(folder / "README.md")


def save_predictions(file: Path, test: Images, classes: list[str], probabilities: Any) -> None:
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = csv.writer(lines)
        rows.writerow(["path", "label", "predicted", "probability"])
        for item, (probability, row) in zip(test.items, (each.max(0) for each in probabilities), strict=True):
            rows.writerow([item.path, item.label, classes[int(row)], f"{float(probability):.4f}"])


def load(folder: Path) -> tuple[APINet, list[str], dict[str, Any]]:
    """The net in eval mode, its classes, and the settings of timm's `create_transform`.

    Raises:
        SystemExit: there is no such model; the message says what is missing.
    """
    if not (folder / "classes.json").is_file():
        raise SystemExit(f"{folder}: not a model folder of train_own.py, it has no classes.json")
    try:
        about = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        classes, transform = about["classes"], about["transform"]
        net = APINet.from_pretrained(str(folder)).eval()
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"{folder}: the model cannot be read: {error}") from None
    if net.head.num_classes != len(classes):
        raise SystemExit(f"{folder}: the net has {net.head.num_classes} classes, classes.json {len(classes)}")
    return net, classes, transform
