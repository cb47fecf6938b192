"""Settings of a run of train_cub.py: every field is a flag, and a preset is a set of their defaults."""

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any

from apinet_head.mutual import MUTUALS
from workbench import number
from workbench.datasets import ARCHIVES
from workbench.datasets.bad_images import LIST

SEARCHES = ("similar", "dissimilar", "random", "none")
AUTO = "auto"


def setting(default: Any, help: str, choices: Any = None, group: str = "", least: float = 0, most: float = inf) -> Any:
    """A field: `group` is the title of the flags from here on, numbers are from `least` to `most`."""
    return field(default=default, metadata={"help": help, "choices": choices, "group": group, "range": (least, most)})


@dataclass(frozen=True)
class Settings:
    """One run. The defaults are the paper's setup on CUB-200-2011 (section 4, "Implementation Details")."""

    dataset: str = setting("cub", "which data set the folder --data has", tuple(ARCHIVES), group="data")
    data: str = setting("", "its official folder; without it, the embedded set is drawn into a cache folder")
    species: int = setting(200, "embedded set: number of species", least=2)
    images_per_species: int = setting(60, "embedded set: images of each, half of them for training", least=2)
    image_size: int = setting(512, "embedded set: pixels a side", least=32)
    resize: int = setting(512, "images are resized to a square of this side ...", least=1)
    crop: int = setting(448, "... and cropped to this: at random and flipped to train, the centre to test", least=1)
    skip_bad: str = setting("", f"leave out the images in this list of check_images.py; without a name, in {LIST}")
    cache_images: bool = setting(False, "keep the resized images in memory; for small sets")
    workers: int = setting(4, "processes that load images; 0: none but this one")
    loader_timeout: float = setting(300.0, "seconds to wait for a batch of them before the run ends; 0: for ever")
    method: str = setting("api", "API-Net, or the same net with cross-entropy", ("api", "baseline"), group="model")
    backbone: str = setting("resnet101", "any timm model name")
    backbone_args: str = setting("{}", "further arguments of timm.create_model, as JSON")
    pretrained: bool = setting(True, "start from timm's weights for the backbone (ImageNet)")
    weights: str = setting("", "a file of weights for the backbone instead; a run keeps its name, not its path")
    chunk_size: int | str = setting(0, "images in the backbone at a time, to save memory; 0: all; auto: what fits")
    keep_chunks: int = setting(1, "of these chunks, how many are not recomputed; auto chooses this, too")
    hidden_dim: int = setting(512, "width of the mutual vector's MLP", least=1)
    dropout: float = setting(0.5, "in that MLP and before the classifier", most=1)
    mutual: str = setting("mlp", "the mutual vector", MUTUALS)
    gate: str = setting("pair", "a gate for each image of a pair, or one for both", ("pair", "single"))
    pairs: str = setting("mined", "by distance, or at random whatever the class", ("mined", "random"), group="pairs")
    intra: str = setting("similar", "the partner of the same class, if mined", SEARCHES)
    inter: str = setting("similar", "the partner of another class, if mined", SEARCHES)
    memory: int = setting(0, "past features that mined partners are also searched in, besides the batch; 0: none")
    margin: float = setting(0.05, "of the ranking term", group="loss", least=-inf)
    rank_weight: float = setting(1.0, "of the ranking term")
    label_smoothing: float = setting(0.0, "of the cross-entropy", most=1)
    n_classes: int = setting(30, "classes in a batch", group="optimisation", least=2)
    n_samples: int = setting(4, "images of each", least=1)
    epochs: int = setting(100, "each of (training images) // (batch) batches, all classes equally often", least=1)
    lr: float = setting(0.01, "learning rate, to zero by a cosine stepped every iteration")
    backbone_lr: float = setting(0.0, "learning rate of the backbone; 0: the same")
    momentum: float = setting(0.9, "of SGD, without Nesterov")
    weight_decay: float = setting(5e-4, "of all parameters")
    frozen_epochs: int = setting(8, "epochs at the start in which the backbone's weights stay fixed")
    frozen_batch_norm: str = setting("train", "the backbone's BatchNorm in these; published: train", ("train", "eval"))
    seed: int = setting(0, "of weights, batches, augmentation", group="run")
    device: str = setting("auto", "where to run: auto, cpu, cuda, mps")
    amp: str = setting("no", "mixed precision", ("no", "fp16", "bf16"))
    threads: int = setting(0, "CPU threads; 0: torch's choice")
    eval_every: int = setting(1, "test after each so many epochs, and after the last", least=1)
    eval_batch: int = setting(100, "test images at a time", least=1)
    checkpoint_minutes: float = setting(10.0, "save after so many minutes too, not only with an epoch; 0: only then")
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints to keep", least=1)
    skip_nonfinite: int = setting(0, "skip up to so many steps whose loss or gradients are infinite or NaN")
    output: str = setting("", "folder of the run; without it, runs/DATA-METHOD-BACKBONE-seedN")


DEMO: dict[str, Any] = {
    "species": 20, "images_per_species": 60, "image_size": 96, "resize": 72, "crop": 64, "cache_images": True,
    "workers": 0, "backbone": "resnet10t", "backbone_args": '{"channels": [24, 48, 96, 192], "stem_width": 8}',
    "pretrained": False, "hidden_dim": 64, "n_classes": 10, "epochs": 100, "lr": 0.05, "frozen_epochs": 0,
    "threads": 1, "eval_every": 5,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "demo": DEMO}
# Where the preset "paper" has other defaults for a data set than for CUB-200-2011.
RECIPES: dict[str, dict[str, Any]] = {"dogs": {"epochs": 50, "lr": 0.001, "frozen_epochs": 12}}
# Settings that change no result: a run may be resumed with others.
HARMLESS = {
    "output", "workers", "cache_images", "device", "eval_batch", "threads", "checkpoint_minutes", "keep_checkpoints",
    "skip_nonfinite", "skip_bad", "loader_timeout",
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings that the command line asks for; --preset, --data and --dataset decide the defaults of the others."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--preset", choices=PRESETS, help="defaults of all flags: paper, or demo without --data")
    for name in ("data", "dataset", "backbone"):
        first.add_argument(f"--{name}", default="")
    known = first.parse_known_args(arguments)[0]
    name = known.preset or ("paper" if known.data else "demo")
    preset = {**PRESETS[name], **(RECIPES.get(known.dataset, {}) if name == "paper" else {})}
    if known.backbone and known.backbone != preset.get("backbone"):
        preset.pop("backbone_args", None)  # they are those of the preset's own backbone

    parser = argparse.ArgumentParser(
        description="Train API-Net, or the baseline, on one of the paper's five data sets or on the embedded birds.",
        epilog="An interrupted run resumes from its last checkpoint when it is started again with the same command.",
        conflict_handler="resolve",
        parents=[first],
    )
    group: Any = parser
    for item in fields(Settings):
        about = item.metadata
        group = parser.add_argument_group(about["group"]) if about["group"] else group
        default, demo = preset.get(item.name, item.default), DEMO.get(item.name, item.default)
        kind: dict[str, Any] = {"choices": about["choices"]}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif item.name == "chunk_size":
            kind["type"] = chunk_size
        elif item.name == "skip_bad":
            kind |= {"nargs": "?", "const": LIST, "metavar": "FILE"}
        elif not isinstance(default, str):
            kind["type"] = number(type(default), *about["range"])
        shown = f"{item.default}" if demo == item.default else f"paper: {item.default}, demo: {demo}"
        shown = f" ({shown})".replace("%", "%%") if shown else ""
        group.add_argument(f"--{item.name.replace('_', '-')}", default=default, help=f"{about['help']}{shown}", **kind)
    chosen = vars(parser.parse_args(arguments))
    del chosen["preset"]
    try:
        dict(json.loads(chosen["backbone_args"]))
    except (TypeError, ValueError) as error:
        parser.error(f"--backbone-args must be a JSON object, got {chosen['backbone_args']!r}: {error}")
    if chosen["crop"] > chosen["resize"]:
        parser.error(f"--crop {chosen['crop']} must not be larger than --resize {chosen['resize']}")
    if chosen["dataset"] != "cub" and not chosen["data"]:
        archive = ARCHIVES[chosen["dataset"]]
        parser.error(f"--dataset {chosen['dataset']} needs --data, {archive.expected}. {archive.source}")
    if chosen["skip_bad"] and not chosen["data"]:
        parser.error("--skip-bad needs --data: the embedded birds are drawn without bad images")
    return Settings(**chosen)


def chunk_size(text: str) -> int | str:
    return text if text == AUTO else number(int, 0)(text)


def run_folder(settings: Settings) -> Path:
    data = Path(settings.data).name if settings.data else "birds"
    return Path(settings.output or f"runs/{data}-{settings.method}-{settings.backbone}-seed{settings.seed}")


def differences(old: dict[str, Any], new: dict[str, Any], harmless: Collection[str]) -> list[str]:
    """What differs between the settings of two runs, except for what changes no result."""
    # With "auto", a resumed run keeps the numbers that it began with.
    harmless = {*harmless, *(("chunk_size", "keep_chunks") if new["chunk_size"] == AUTO else ())}
    changed = {name: value for name, value in new.items() if name not in harmless and old.get(name) != value}
    return [f"{name}: {old.get(name)!r} there, {value!r} here" for name, value in sorted(changed.items())]
