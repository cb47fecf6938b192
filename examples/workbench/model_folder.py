"""The folder of a trained model: all that is needed to use it.

model.safetensors, config.json   the net, for APINet.from_pretrained
classes.json                     names by row of the logits, and how images are prepared (`images.eval_transform`)

train_cub.py adds run.json; train_own.py adds metrics.json, a model card and a report.
"""

import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from timm.data import resolve_model_data_config

from apinet_head import APINet


class Model(NamedTuple):
    """A net in eval mode, the names of its classes, and how its images are prepared."""

    net: APINet
    classes: list[str]
    transform: dict[str, Any]


def normalization(net: APINet) -> dict[str, list[float]]:
    """Mean and standard deviation with which the backbone's weights were trained."""
    config = resolve_model_data_config(net.backbone)
    return {name: list(config[name]) for name in ("mean", "std")}


def save(folder: Path, model: Model) -> None:
    """Write all that `load` reads."""
    model.net.save_pretrained(folder)
    about = {"classes": model.classes, "transform": model.transform}
    (folder / "classes.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    # safetensors lets the owner alone read its file, whatever the umask.
    shutil.copymode(folder / "classes.json", folder / "model.safetensors")


def load(folder: Path) -> Model:
    if not (folder / "classes.json").is_file():
        raise SystemExit(f"{folder}: not a model folder, it has no classes.json; give the folder that a training wrote")
    try:
        about = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        classes, transform = about["classes"], about["transform"]
        with redirect_stdout(sys.stderr):  # huggingface_hub prints a line, which is not part of a command's result
            net = APINet.from_pretrained(str(folder)).eval()
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise SystemExit(f"{folder}: the model cannot be read: {' '.join(str(error).split())}") from None
    if net.head.num_classes != len(classes):
        raise SystemExit(f"{folder}: the net has {net.head.num_classes} classes, classes.json {len(classes)}")
    return Model(net, classes, transform)
