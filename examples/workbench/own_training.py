"""The net, its images and the training loop."""

import math
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apinet_head import APINet, BalancedBatchSampler, api_loss
from workbench.augmentation import AugmentedImages, PlacedBatches
from workbench.datasets.folders import Item
from workbench.image_files import load_image

TESTS = 20  # times that the test images are looked at for the curves, at most; they choose nothing


class Images(Dataset[tuple[Tensor, int]]):
    """Transformed images [3,H,W], and the rows of their classes."""

    def __init__(self, items: list[Item], classes: list[str], transform: Any) -> None:
        rows = {name: row for row, name in enumerate(classes)}
        self.items, self.transform = items, transform
        self.labels = [rows[item.label] for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(load_image(self.items[index].path)), self.labels[index]


def fixed_size(backbone: str) -> int | None:
    """Pixels a side, of a backbone of timm that takes no other images unless it is made for them.

    Raises:
        SystemExit: timm has no such model.
    """
    if not timm.is_model(backbone):
        similar = ", ".join(timm.list_models(f"*{backbone}*")[:5])
        raise SystemExit(f"--backbone {backbone}: timm has no such model; {f'similar: {similar}' if similar else ''}")
    config = timm.get_pretrained_cfg(backbone)
    return config.input_size[1] if config is not None and config.fixed_input_size else None


def make_net(options: Namespace, classes: int) -> tuple[APINet, dict[str, Any]]:
    """The net, and the arguments with which a model folder makes it again, without weights from elsewhere.

    Raises:
        SystemExit: the pretrained weights are not to be had, or the backbone takes no images of this size.
    """
    config: dict[str, Any] = {"backbone": options.backbone, "num_classes": classes}
    if fixed_size(options.backbone) not in (None, options.image_size):
        config["backbone_args"] = {"img_size": options.image_size}
    # First without weights: what is wrong with the arguments shows here, and what comes later is the network's.
    try:
        net = APINet(**config, chunk_size=options.chunk_size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"--backbone {options.backbone} --image-size {options.image_size}: {error}") from None
    if options.no_pretrained:
        return net, config
    try:
        return APINet(**config, chunk_size=options.chunk_size, pretrained=True), config
    except Exception as error:  # of the Hub's client, the network's, the file system's: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SystemExit(
            f"the pretrained weights of {options.backbone} are not to be had: {reason}\nThe first time, they are "
            "downloaded from the Hugging Face Hub, which needs the network; --no-pretrained trains from scratch, "
            "which needs more images"
        ) from None


def transforms(net: APINet, size: int) -> tuple[Any, dict[str, Any]]:
    """For training, and the settings of timm's `create_transform` for testing: the whole height or width, no border.

    Crops are larger and colours change less than in timm's defaults: a detail may be all in which two classes differ.
    """
    config = resolve_model_data_config(net.backbone)
    test = {
        "input_size": [3, size, size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }
    chance = {"is_training": True, "scale": (0.4, 1.0), "color_jitter": 0.2, "interpolation": "bicubic"}
    return create_transform(**{**test, **chance}), test


def fit(net: APINet, train: Images, test: Images, options: Namespace) -> list[dict[str, float]]:
    """Train to the last epoch; a row for each: loss, accuracy in training and, for some epochs, on the test images."""
    sampler = BalancedBatchSampler(train.labels, options.n_classes, options.n_samples, seed=options.seed)
    loader = DataLoader(
        AugmentedImages(train), batch_sampler=PlacedBatches(sampler), num_workers=options.workers,
        persistent_workers=options.workers > 0, pin_memory=options.device.startswith("cuda"),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameter_groups(options.lr, options.backbone_lr, options.weight_decay))
    steps = options.epochs * len(sampler)
    schedule = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False)
    every = -(-options.epochs // TESTS)
    history: list[dict[str, float]] = []
    shown: dict[str, str] = {}
    with tqdm(total=steps, unit=" steps", mininterval=0.5) as bar:
        for epoch in range(options.epochs):
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}")
            sampler.set_epoch(epoch)
            net.train()
            losses, right, seen = [], 0, 0
            for images, labels in loader:
                schedule.step_update(bar.n)
                loss, correct = step(net, images, labels, optimizer, options)
                losses.append(loss)
                right, seen = right + sum(correct), seen + len(correct)
                bar.set_postfix({"loss": f"{loss:.3f}", **shown}, refresh=False)
                bar.update()
            row = {"epoch": epoch + 1, "loss": sum(losses) / len(losses), "train_accuracy": right / seen}
            if (epoch + 1) % every == 0 or epoch + 1 == options.epochs:
                predicted = probabilities(net, test, options).argmax(1)
                row["test_accuracy"] = int((predicted == torch.tensor(test.labels)).sum()) / len(test)
                shown = {"test": f"{row['test_accuracy']:.1%}"}
            history.append(row)
    return history


def step(
    net: APINet, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, options: Namespace
) -> tuple[float, list[bool]]:
    """One update; the loss, and for each row of logits whether it is right.

    Raises:
        SystemExit: the loss is not finite.
    """
    images = images.to(options.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(options.device, non_blocking=True)
    if options.baseline:
        logits, targets = net(images), labels
        loss = F.cross_entropy(logits, targets)
    else:
        output = net(images, labels)
        logits, targets = output.logits_self, output.labels
        loss = api_loss(output)
    value = loss.item()
    if not math.isfinite(value):
        raise SystemExit(f"\nthe loss is {value}: try a lower --lr than {options.lr:g}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return value, (logits.argmax(1) == targets).tolist()


@torch.no_grad()
def probabilities(net: APINet, images: Images, options: Namespace) -> Tensor:
    """[N,C], of each image and class, on the CPU."""
    net.eval()
    loader = DataLoader(images, batch_size=32, num_workers=options.workers)
    return torch.cat([net(batch.to(options.device)).softmax(1).cpu() for batch, _ in loader])


@contextmanager
def advice_on_memory(options: Namespace) -> Iterator[None]:
    """Ends the command with what to do where a GPU's memory runs out.

    Raises:
        SystemExit: it did.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        batch = options.n_classes * options.n_samples
        half = max(1, (options.chunk_size or batch) // 2)
        raise SystemExit(
            f"\n{error}\nThe step was one of {batch} images of {options.image_size} x {options.image_size} pixels, "
            f"{f'in chunks of {options.chunk_size}' if options.chunk_size else 'all at once'}. The same batch in less "
            f"memory: --chunk-size {half}; less is also needed with a smaller --image-size or --n-classes"
        ) from None
