"""Does API-Net help on photographs, with pretrained weights? A study that can be interrupted and resumed.

python examples/study.py birds:5 birds:30 cells=DIR --weights tf_efficientnet_lite0=FILE --out runs/study
python examples/study.py cells=DIR --weights tf_efficientnet_lite0=FILE --out runs/study --vary     # its settings
python examples/study.py --out runs/study                                                           # tables alone

The methods train on the same images for the same number of steps: API-Net, cross-entropy on the same balanced batches
and on shuffled images, and supervised contrastive loss (pytorch-metric-learning) with cross-entropy, which needs a
trainable embedding; so API-Net and cross-entropy also come with one ("-embedding"). The head is trained on features of
a frozen backbone or, with --fine-tune, with the backbone. A data set is a folder as train_own.py takes it, or drawn
birds; ":5" takes 5 training images of each class.

The test images stay the same. A seed decides the training images, batches and initial weights. Each method's learning
rate is chosen on other seeds, by the accuracy on validation images. Every run is a line of runs.jsonl in --out, and is
not run again; study.md has the tables, study.csv the figures, study.png the differences.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import RandomCrop
from tqdm import tqdm

from apinet_head import APIHead, BalancedBatchSampler, api_loss
from workbench import Command, number, study_tables, writing
from workbench.datasets import ImageSet, cache_folder
from workbench.datasets.bird_lists import read_cub
from workbench.datasets.folders import read
from workbench.frozen import features_of
from workbench.guard import check_backbone
from workbench.images import ImageDataset, eval_transform
from workbench.tables import machine
from workbench.weights import load_weights

METHODS = ("api", "balanced", "shuffled", "supcon", "api-embedding", "balanced-embedding")
EMBEDDING = 512  # channels
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Tried first, then further ones while the best is at an end; fewer for trainings that take a minute.
FIRST_FROZEN, FIRST_TUNED = slice(2, 7), slice(2, 5)
CHOOSING = (1000, 1001, 1002)  # seeds for choosing learning rates; not used for testing
SPECIES, DRAWN = 20, 120  # of the birds; half of the images are test images
BATCH = 32
VARIED = ("steps", "dropout", "n_samples", "margin", "rank_weight", "mutual", "weighted", "frozen_steps")
BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Run:
    """All that a run depends on: the key of its line."""

    data: str
    backbone: str
    image_size: int
    tuned: bool  # the backbone too
    method: str
    part: str  # "validation" or "test"
    seed: int
    lr: float
    steps: int
    n_classes: int
    n_samples: int
    margin: float = 0.05
    rank_weight: float = 1.0
    dropout: float = 0.5
    mutual: str = "mlp"
    weighted: bool = False  # loss: by the class's number of images, for shuffled batches by its inverse
    frozen_steps: int = 0  # of a backbone that is trained: steps at first in which the head learns alone


@dataclass(frozen=True)
class Pool:
    """Inputs [N,...] (features, or images for a backbone to be tuned) and labels [N], for training and for testing."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    per_class: int  # training images of each class, 0 for all


def train(
    run: Run, inputs: Tensor, labels: Tensor, classes: int, backbone: nn.Module | None
) -> tuple[nn.Module, float]:
    """The trained net in eval mode, and the CPU seconds that training took."""
    torch.manual_seed(run.seed)
    body = nn.Identity() if backbone is None else backbone
    dim = inputs.shape[1] if backbone is None else backbone.num_features
    method, embedded = run.method.partition("-")[0], run.method == "supcon" or run.method.endswith("-embedding")
    embed = nn.Linear(dim, EMBEDDING) if embedded else nn.Identity()
    how = {"dropout": run.dropout, "mutual": run.mutual if method == "api" else "sum"}
    head = APIHead(EMBEDDING if embedded else dim, classes, **how)
    contrast = SupConLoss()  # Khosla et al., 2020
    counts = labels.bincount(minlength=classes)
    weight = (counts / counts.float().mean()) ** (-1 if run.method == "shuffled" else 1) if run.weighted else None
    groups = [{"params": [*embed.parameters(), *head.parameters()]}, {"params": body.parameters(), "lr": run.lr / 10}]
    optimizer = torch.optim.AdamW(groups[: 1 if backbone is None else 2], lr=run.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # warm-up and cosine
        optimizer, lambda step: min(1.0, 20 * (step + 1) / run.steps) * (1 + math.cos(math.pi * step / run.steps)) / 2
    )
    start = time.process_time()
    head.train(), body.train()
    for step, rows in enumerate(batches(run, labels)):
        body.requires_grad_(step >= run.frozen_steps)
        taken = inputs[rows] if backbone is None else augmented(inputs[rows])
        features, targets = embed(body(taken)), labels[rows]
        if method == "api":
            output = head(features, targets)
            loss = api_loss(output, margin=run.margin, rank_weight=run.rank_weight, class_weight=weight)
        else:
            loss = F.cross_entropy(head(features), targets, weight)
            if method == "supcon":
                loss = loss + contrast(features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return nn.Sequential(body, embed, head).eval(), time.process_time() - start


def batches(run: Run, labels: Tensor) -> BalancedBatchSampler:
    drawn_from = labels, run.n_classes, run.n_samples
    if run.method == "shuffled":  # all images as one class, drawn without replacement
        drawn_from = [0] * len(labels), 1, min(run.n_classes * run.n_samples, len(labels))
    return BalancedBatchSampler(*drawn_from, n_batches=run.steps, seed=run.seed)


def augmented(images: Tensor) -> Tensor:
    """The images [B,3,H,W], each mirrored or not, and all shifted by up to an eighth."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
    shift = RandomCrop(images.shape[-2:], padding=images.shape[-1] // 8, padding_mode="reflect")
    return shift(mirrored)


def split(labels: Tensor, per_class: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows for training and for validation: a quarter of each class for validation, of the rest all or `per_class`."""
    rng, train_rows, validation_rows = random.Random(seed), [], []
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero().flatten().tolist()
        rng.shuffle(rows)
        count = max(1, len(rows) // 4)
        validation_rows += rows[:count]
        train_rows += rows[count : count + per_class if per_class else None]
    return train_rows, validation_rows


def execute(run: Run, pool: Pool, backbone: Any) -> dict[str, Any]:
    """Train and test; the figures of the run's line. `backbone()` makes the one to be tuned."""
    train_rows, validation_rows = split(pool.labels, pool.per_class, run.seed)
    classes, labels = int(pool.labels.max()) + 1, pool.labels[train_rows]
    net, seconds = train(run, pool.inputs[train_rows], labels, classes, backbone() if run.tuned else None)
    inputs, targets = pool.inputs[validation_rows], pool.labels[validation_rows]
    if run.part == "test":
        inputs, targets = pool.test_inputs, pool.test_labels
    with torch.inference_mode():
        logits = torch.cat([net(part) for part in inputs.split(256)])
    share = labels.bincount(minlength=classes) / len(labels)
    # From the uniform prior of balanced batches to that of the training images; for shuffled ones the other way round.
    shift = share.log() * (-1 if (run.method == "shuffled") != run.weighted else 1)
    figures = {"seconds": seconds, **measure(logits, targets)}
    figures |= {f"adjusted_{name}": value for name, value in measure(logits + shift, targets).items()}
    right = (logits.argmax(1) == targets).tolist()
    return figures | {"right": "".join("01"[each] for each in right)} if run.part == "test" else figures


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies, calibration error, cross-entropy in nats, and the error of the predicted class shares."""
    likely, classes = logits.double().softmax(1), logits.shape[1]
    confidence, guess = likely.max(1)
    right = (guess == labels).double()
    of_class = [right[labels == label].mean().item() for label in labels.unique()]
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add(0, bins, right - confidence)
    shares = labels.bincount(minlength=classes) / len(labels)
    return {
        "accuracy": right.mean().item(),
        "mean_class_accuracy": mean(of_class),
        "calibration_error": gaps.abs().sum().item() / len(labels),
        "cross_entropy": F.cross_entropy(logits.double(), labels).item(),
        "prior_error": (likely.mean(0) - shares).abs().sum().item() / 2,
    }


class Study:
    """The runs in runs.jsonl; a run that is not there is run when asked for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "runs.jsonl"
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # interrupted while writing a line
            self.file.write_text(whole, encoding="utf-8")
        newer = {each.name: each.default for each in fields(Run) if each.default is not MISSING}
        rows = [newer | json.loads(line) for line in whole.splitlines()]
        self.done = {Run(**{each.name: row[each.name] for each in fields(Run)}): row for row in rows}

    def get(self, run: Run, pool: Pool, backbone: Any) -> dict[str, Any]:
        """The line of the run, which is run first if there is none."""
        if run not in self.done:
            row = asdict(run) | execute(run, pool, backbone) | {"machine": machine("cpu")}
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            self.done[run] = row
        return self.done[run]

    def choose_rate(self, run: Run, pool: Pool, backbone: Any) -> Run:
        """The run with the learning rate of the best accuracy on validation images, over several seeds."""
        found: dict[float, float] = {}
        rates = list(RATES[FIRST_TUNED if run.tuned else FIRST_FROZEN])
        while rates:
            for lr in rates:
                runs = [replace(run, part="validation", seed=seed, lr=lr) for seed in CHOOSING]
                found[lr] = mean(self.get(each, pool, backbone)["accuracy"] for each in runs)
            best = max(sorted(found), key=lambda lr: found[lr])
            place = RATES.index(best)
            rates = [lr for lr in RATES[max(0, place - 1) : place + 2] if lr not in found]
        return replace(run, lr=best)


def variants(run: Run, names: Collection[str]) -> list[Run]:
    """The settings that users vary, one at a time; only those in `names`, if there are any."""
    batch = run.n_classes * run.n_samples
    shared = [replace(run, steps=run.steps // 4), replace(run, steps=4 * run.steps), replace(run, dropout=0.0)]
    shared += [replace(run, n_samples=n, n_classes=batch // n) for n in (2, 4, 8)]
    if run.method.startswith("api"):
        shared += [replace(run, margin=margin) for margin in (0.0, 0.2, 0.5)]
        shared += [replace(run, rank_weight=weight) for weight in (0.0, 3.0)]
        shared += [replace(run, mutual=mutual) for mutual in ("sum", "product")]
    if run.method != "supcon":
        shared.append(replace(run, weighted=True))
    if run.tuned:
        shared += [replace(run, frozen_steps=run.steps // part) for part in (10, 2)]
    return [each for each in shared if not names or any(getattr(each, name) != getattr(run, name) for name in names)]


def read_source(source: str) -> tuple[ImageSet, int]:
    """The images, and how many training images of each class are taken."""
    place, _, count = source.partition(":")
    name, _, folder = place.rpartition("=")
    if folder == "birds":
        from birds.dataset import write_birds  # here, as only this data set needs them

        root = cache_folder() / f"study-birds-{SPECIES}x{DRAWN}-224px"
        data = read_cub(write_birds(root, species=SPECIES, images_per_species=DRAWN, size=224))
        return replace(data, name=source), int(count or 0)
    title = (name or Path(folder).name) + (f":{count}" if count else "")
    return read(Path(folder), 0.3).as_image_set(title), int(count or 0)


def study_one(study: Study, source: str, name: str, weights: Path | None, options: argparse.Namespace) -> None:
    """All runs on one data set with one backbone."""

    def backbone() -> nn.Module:
        torch.manual_seed(0)
        made = timm.create_model(name, pretrained=weights is None, num_classes=0)
        if weights is not None:
            load_weights(made, weights)
        return made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    made = backbone()
    config = resolve_model_data_config(made)
    size = options.image_size or config["input_size"][-1]
    transform = {"input_size": [3, size, size], "interpolation": "bicubic", "crop_pct": 1.0}
    transform |= {key: list(config[key]) for key in ("mean", "std")}
    data, per_class = read_source(source)
    parts = []
    for images in (data.train, data.test):
        if options.fine_tune:
            dataset = ImageDataset(images, eval_transform(transform))
            inputs = torch.stack([each[0] for each in tqdm(dataset, desc=data.name)])
            inputs = inputs.contiguous(memory_format=torch.channels_last)  # twice as fast on CPUs
        else:
            inputs = features_of(made, images, transform, torch.device("cpu"), options.workers)
        parts += [inputs, torch.tensor([image.label for image in images])]
    pool, n_classes = Pool(*parts, per_class), min(len(data.classes), BATCH // 4)
    budget = options.steps, n_classes, BATCH // n_classes
    base = Run(data.name, name, size, options.fine_tune, "api", "test", 0, 0.0, *budget)
    chosen = [study.choose_rate(replace(base, method=method), pool, backbone) for method in options.methods]
    runs, seeds = chosen, range(options.seeds)
    if options.vary is not None:
        varied = [each for run in chosen for each in variants(run, options.vary) if each.n_classes <= len(data.classes)]
        runs, seeds = [replace(run, part="validation") for run in varied], CHOOSING
    for seed in tqdm(seeds, desc=f"{data.name} {name}"):
        for run in runs:
            study.get(replace(run, seed=seed), pool, backbone)


def main(arguments: list[str] | None = None) -> None:
    parser = Command(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="NAME=DIR[:N]", help='data sets; "birds" are drawn')
    about = "a timm model, and a file of its weights (without: timm's, from the Hub); once for each backbone"
    add("--weights", action="append", default=[], metavar="BACKBONE=FILE", help=about)
    add("--out", type=Path, default=Path("runs/study"), help="folder of the runs and tables")
    add("--methods", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    add("--seeds", type=number(int, 2), default=20, help="runs of each method on test images")
    add("--steps", type=number(int, 20), default=400, help="of each run")
    about = f"vary settings instead, on validation images: all, or some of {', '.join(VARIED)}"
    add("--vary", nargs="*", choices=VARIED, metavar="SETTING", help=about)
    add("--fine-tune", action="store_true", help="train the backbone too, which takes much longer")
    add("--image-size", type=number(int, 32), help="pixels a side (default: the backbone's own)")
    add("--workers", type=number(int, 0), default=0, help="processes that load images")
    options = parser.parse_args(arguments)
    if options.sources and not options.weights:
        parser.error("--weights BACKBONE=FILE is needed, or --weights BACKBONE for weights from the Hub")
    with writing("--out", options.out):
        study = Study(options.out)
    for source in options.sources:
        for given in options.weights:
            name, _, file = given.partition("=")
            check_backbone(name)
            study_one(study, source, name, Path(file) if file else None, options)
    study_tables.write(options.out, list(study.done.values()))


if __name__ == "__main__":
    main()
