"""Fine-tune on your own images: train_own.py DIR, a folder of class folders, or a CSV of path,label.

Writes a model folder with the net, its classes, its metrics, a model card and an HTML report (report.html).
An interrupted training resumes from its last checkpoint when started again with the same command.

python examples/train_own.py DIR
python examples/train_own.py DIR --backbone convnext_tiny --image-size 288 --out model
python examples/train_own.py DIR --backbone resnet50 --weights resnet50.pth --frozen         # no network; a minute
python examples/train_own.py DIR --baseline shuffled --out baseline     # cross-entropy as usual, to compare with
"""

import workbench  # noqa: F401  # first, so that Ctrl-C ends the imports, which take seconds, with a line

# isort: split
import argparse
import csv
import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import create_transform
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from tqdm import tqdm

from apinet_head import APIHead, APINet, BalancedBatchSampler, api_loss
from workbench import DEVICE, Command, counted, metrics, model_folder, number, processors, report, shown
from workbench.checkpoint import RunState
from workbench.datasets import ImageSet
from workbench.datasets.bad_images import ending_at_bad_images
from workbench.datasets.folders import Split, by_class, read, short_side, sound, warnings
from workbench.defaults import Known, choose
from workbench.distributed import end_all
from workbench.frozen import feature_loader, features_of
from workbench.guard import advice_on_memory, check_backbone, check_device, making_the_net, nonfinite, noting_signals
from workbench.images import ImageDataset, eval_loader, eval_transform, to_device, train_loader
from workbench.metrics import predict
from workbench.model_card import make_card
from workbench.model_folder import Model
from workbench.run_folder import RunFolder, describe, lock
from workbench.tables import machine
from workbench.weights import load_weights, named

NOT_SETTINGS = ("source", "out", "overwrite", "weights")
HARMLESS = {"workers", "device", "checkpoint_minutes"}  # an interrupted training may be resumed with others
TESTS = 20  # evaluations on the test images for the curves, at most; they choose nothing


def make_parser() -> argparse.ArgumentParser:
    parser = Command(__doc__)
    parser.add_argument("source", type=Path, help="folder of class folders, in train/ and test/ or not; or a CSV")
    add = parser.add_argument_group("data").add_argument
    add("--test-share", type=float, default=0.25, help="share of each class held out, if there is no split")
    add("--skip-bad", action="store_true", help="leave out images that cannot be decoded")
    add = parser.add_argument_group("model").add_argument
    add("--out", type=Path, default=Path("own-model"), help="model folder")
    add("--overwrite", action="store_true", help="overwrite the model in --out")
    add("--no-pretrained", action="store_true", help="train from scratch, without weights from the network")
    add("--weights", type=Path, metavar="FILE", help="weights of the backbone, instead of timm's from the network")
    about = "train the head alone, on features that are computed once for each image and kept: much faster"
    add("--frozen", action="store_true", help=about)
    about = "images at a time through the backbone: the same batch in less memory (default: all)"
    add("--chunk-size", type=number(int, 1), metavar="N", help=about)
    add = parser.add_argument_group("chosen from the data, if not given").add_argument
    add("--backbone", help="any timm model name")
    add("--image-size", type=number(int, 32), help="pixels a side")
    add("--n-classes", type=number(int, 2), help="classes in a batch")
    add("--n-samples", type=number(int, 1), help="images of each of these classes in a batch")
    add("--epochs", type=number(int, 1), help="passes over the sampler's batches")
    add("--lr", type=number(float, 0), help="learning rate of AdamW")
    add("--backbone-lr", type=number(float, 0), help="learning rate of the backbone (a tenth of --lr if pretrained)")
    add = parser.add_argument_group("training").add_argument
    about = "cross-entropy instead of API-Net: on the same balanced batches, or on shuffled ones as usual"
    add("--baseline", choices=("balanced", "shuffled"), default="", help=about)
    about = "prior of the classes after training on balanced batches: equal, or the shares of the training images, "
    about += "whose logarithms are added to the classifier's bias"
    add("--prior", choices=("equal", "images"), default="equal", help=about)
    add("--weight-decay", type=number(float, 0), default=0.05, help="weight decay of AdamW")
    add("--amp", choices=("no", "fp16", "bf16"), default="no", help="mixed precision")
    add("--seed", type=int, default=0, help="seed of split, batches, crops and weights")
    add = parser.add_argument_group("run").add_argument
    add("--device", **DEVICE)
    add("--workers", type=number(int, 0), default=min(8, processors() - 1), help="processes that load images; 0: none")
    about = "save after so many minutes too, not only with an epoch; 0: only then"
    add("--checkpoint-minutes", type=number(float, 0), default=5.0, help=about)
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 < options.test_share < 1:
        parser.error(f"--test-share must be between 0 and 1, got {options.test_share}")
    # Mistakes in the flags are found before all images are decoded.
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("train_own.py is for one process: start it with python, or take train_cub.py for several")
    device = check_device(options.device)
    check_free(options.out, options.overwrite)
    if options.backbone:
        check_backbone(options.backbone)
    if options.weights and (options.no_pretrained or not options.backbone):
        parser.error("--weights are those of a --backbone, and go without --no-pretrained")
    if options.frozen and options.no_pretrained:
        parser.error("--frozen needs a pretrained backbone: leave out --no-pretrained")
    if options.prior == "images" and options.baseline == "shuffled":
        parser.error("--prior images corrects balanced batches: shuffled ones have that prior already")
    weights = named(options.weights) if options.weights else ""

    # Data, and what is chosen from it.
    data, notes = read_data(options)
    fill_in(options, data, device)
    sampler, note = make_sampler(options, data)
    notes.append(note)
    print(note)
    settings = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS} | {"weights": weights}

    # Net, optimiser, schedule.
    folder = RunFolder(options.out / "run", settings | describe(data), HARMLESS)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=options.amp)
    device = accelerator.device
    set_seed(options.seed)
    net = make_net(options, len(data.classes)).to(device, memory_format=torch.channels_last)
    model = net.head if options.frozen else net  # what is trained
    steps = options.epochs * sampler.n_batches
    net.freeze_backbone(options.frozen, batch_norm="eval")
    groups = net.parameter_groups(options.lr, options.backbone_lr, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=device.type != "mps")
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=steps // 20, t_in_epochs=False)
    optimizer = accelerator.prepare_optimizer(optimizer)
    transform = {"input_size": [3, options.image_size, options.image_size], "interpolation": "bicubic", "crop_pct": 1.0}
    transform |= model_folder.normalization(net)
    # Crops are larger and colours change less than in timm's defaults: two classes may differ in one detail only.
    train_transform = create_transform(**transform, is_training=True, scale=(0.4, 1.0), color_jitter=0.2)
    train, test = ImageDataset(data.train, train_transform), ImageDataset(data.test, eval_transform(transform))
    loader = train_loader(train, sampler, device, options.workers)
    test_loader = eval_loader(data.test, transform, 32, options.workers, 0)
    if options.frozen:
        how = transform, device, options.workers
        with ending_at_bad_images():
            loader = feature_loader(data.train, features_of(net.backbone, data.train, *how), sampler)
            test_loader = feature_loader(data.test, features_of(net.backbone, data.test, *how), [range(len(test))])

    # Start, or resume exactly where the training was interrupted.
    state = RunState(accelerator, net, optimizer, scheduler, sampler)
    check_free(options.out, options.overwrite)  # again: another training may have finished meanwhile
    folder.go_on(state, options.epochs)
    progress = state.progress
    every, batch = -(-options.epochs // TESTS), options.n_classes * options.n_samples
    with (
        noting_signals() as noted,
        advice_on_memory(net, batch, options.image_size, options.chunk_size or 0),
        ending_at_bad_images(),
        tqdm(total=steps, initial=progress.step, unit=" steps", mininterval=0.5) as bar,
    ):
        for epoch in range(progress.epoch, options.epochs):
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}")
            sampler.set_epoch(epoch)
            model.train()
            start = time.perf_counter() - progress.seconds
            for images, labels, indices in loader:
                # Forward, loss, backward, step.
                scheduler.step_update(progress.step)
                images, labels = to_device(images, device), labels.to(device, non_blocking=True)
                with accelerator.autocast():
                    figures = compute_loss(model, images, labels, options.baseline)
                optimizer.zero_grad()
                accelerator.backward(figures["loss"])
                # Scaled gradients of fp16 may overflow; the scaler then reduces its scale.
                if wrong := nonfinite(figures, [] if accelerator.scaler else net.parameters()):
                    paths = "\n  ".join(shown(str(data.train[index].path)) for index in indices.tolist())
                    advice = f"try a lower --lr than {options.lr:g}, or look at its images:\n  {paths}"
                    end_all(f"step {progress.step + 1} is not finite: {wrong}: {advice}", 1)
                optimizer.step()

                # Log and save.
                state.count(figures)
                progress.step, progress.batch = progress.step + 1, progress.batch + 1
                progress.seconds = time.perf_counter() - start
                bar.update()
                folder.save(state, noted.signal, options.checkpoint_minutes)

            # Test, log and save.
            progress.epoch += 1
            row = {name: float(value) / progress.counted for name, value in state.sums.items()}
            row["epoch"] = progress.epoch
            if progress.epoch % every == 0 or progress.epoch == options.epochs:
                logits, truth = predict(model, test_loader, device)
                row["test_accuracy"] = float((logits.argmax(1) == truth).double().mean())
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items() if name != "epoch"}, refresh=False)
            row["seconds"] = progress.seconds
            progress.history.append(row)
            progress.batch, progress.counted, progress.seconds, state.sums = 0, 0, 0.0, {}
            folder.save(state, noted.signal, options.checkpoint_minutes)

        # The result is the net after the last epoch.
        if options.prior == "images":
            share = torch.tensor([image.label for image in data.train]).bincount() / len(data.train)
            net.head.classifier.bias.data += share.log().to(device)
        likely = predict(model, test_loader, device)[0].softmax(1)
    found = measure(data, likely, progress.history) | {"machine": machine(str(device)), "settings": settings}
    found["data"] = {"name": data.name, "train": len(data.train), "test": len(data.test), "notes": notes}
    trained = Model(net.cpu().eval(), data.classes, transform)
    with folder.writing():
        model_folder.save(options.out, trained)
        (options.out / "metrics.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
        write_predictions(options.out / "predictions.csv", data, likely)
        # save_pretrained writes a generic card, and only where there is none.
        make_card(found).save(options.out / "README.md")
        plain = ImageDataset(data.train, eval_transform(transform))
        pairs = report.show_pairs(trained, plain, test, likely, baseline=bool(options.baseline))
        report.write(options.out / "report.html", found, pairs)
    shutil.rmtree(folder.path)  # the model is complete: there is nothing to resume
    low, high = found["accuracy_interval"]
    print(f"test accuracy {found['accuracy']:.1%} ({low:.1%} to {high:.1%}); {options.out / 'report.html'}")


def compute_loss(model: APINet | APIHead, images: Tensor, labels: Tensor, baseline: str) -> dict[str, Tensor]:
    """The loss, and the accuracy over the rows of logits; for a head, `images` are features."""
    if baseline:
        logits, targets = model(images), labels
        loss = F.cross_entropy(logits, targets)
    else:
        output = model(images, labels)
        logits, targets = output.logits_self, output.labels
        loss = api_loss(output)
    return {"loss": loss, "train_accuracy": (logits.argmax(1) == targets).float().mean()}


def make_sampler(options: argparse.Namespace, data: ImageSet) -> tuple[BalancedBatchSampler, str]:
    """The sampler, and a note on what an epoch of it contains."""
    labels = [image.label for image in data.train]
    shuffled, size = options.baseline == "shuffled", min(options.n_classes * options.n_samples, len(labels))
    # Shuffled: all images as one class, drawn without replacement.
    drawn_from = ([0] * len(labels), 1, size) if shuffled else (labels, options.n_classes, options.n_samples)
    with catch_warnings():
        simplefilter("ignore")  # the advice on images without a partner is for code; the note below is for users
        sampler = BalancedBatchSampler(*drawn_from, seed=options.seed)
    epoch = f"an epoch is {counted(sampler.n_batches, 'batch')}"
    if shuffled:
        return sampler, f"{epoch} of {counted(size, 'image')}, none of which occurs twice"
    drawn = [row for batch in sampler for row in batch]
    seen = len(set(drawn))
    note = f"{epoch} in which all classes occur equally often; "
    note += f"the first one has {seen} of the {len(labels)} training images"
    if seen < len(drawn):
        note += ", some of them more than once"
    if len(set(Counter(labels).values())) > 1:
        note += ". So the net learns a uniform prior: it predicts rare classes too often where they are rare"
    if options.n_samples == 1 and not options.baseline:
        note += ". Use --n-samples 2 or more: with 1, no image has a partner of its class"
    return sampler, note


def make_net(options: argparse.Namespace, classes: int) -> APINet:
    """The net; a backbone with a fixed image size is created for the size of the images."""
    arguments = {} if fixed_size(options.backbone) in (None, options.image_size) else {"img_size": options.image_size}
    how = {"pretrained": not options.no_pretrained and not options.weights}
    with making_the_net(options.backbone, instead="--weights takes a file, --no-pretrained", **how):
        net = APINet(options.backbone, classes, chunk_size=options.chunk_size, backbone_args=arguments, **how)
    if options.weights:
        print(load_weights(net.backbone, options.weights))
    return net


def fixed_size(backbone: str) -> int | None:
    """Pixels a side of the images, for a backbone that takes only one size."""
    config = check_backbone(backbone)
    return config.input_size[1] if config and config.fixed_input_size else None


def check_free(folder: Path, overwrite: bool) -> None:
    """End the command if the folder holds what must not be overwritten, or if another training writes into it."""
    if folder.exists() and not folder.is_dir():
        raise SystemExit(f"--out {folder} is a file")
    if (folder / "run" / "lock").exists():
        lock(folder / "run").close()
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {"run"}:
        return
    if not (folder / "classes.json").is_file():
        raise SystemExit(f"--out {folder} holds something other than a model of train_own.py: choose another folder")
    if not overwrite:
        raise SystemExit(f"--out {folder} holds a model: choose another folder, or overwrite it with --overwrite")


def read_data(options: argparse.Namespace) -> tuple[ImageSet, list[str]]:
    """The images, and notes and warnings, which are also printed."""
    split = read(options.source, options.test_share, options.seed)
    check_classes(options, split)  # before all images are decoded
    split = sound(split, options.workers, options.skip_bad)
    check_classes(options, split)  # and without the bad ones
    data = split.as_image_set(options.source.resolve().stem)
    notes = [*split.notes, *(f"warning: {text}" for text in warnings(split.train, split.test))]
    notes = [shown(note) for note in notes]
    numbers = f"{len(data.classes)} classes, {counted(len(data.train), 'training image')}"
    print(f"{numbers} and {counted(len(data.test), 'test image')}", *notes, sep="\n")
    return data, notes


def check_classes(options: argparse.Namespace, split: Split) -> None:
    """End the command if there are not enough classes to train and to test with."""
    classes, tested = by_class(split.train), by_class(split.test)
    if unknown := [name for name in tested if name not in classes]:
        raise SystemExit(f"{options.source}: no training images of the test classes {', '.join(unknown)}")
    if len(classes) < 2:
        raise SystemExit(f"{options.source}: two classes or more are needed, got {', '.join(classes) or 'none'}")
    if not tested:
        raise SystemExit(f"{options.source}: no class has two images, one to train with and one to test")
    if options.n_classes is not None and options.n_classes > len(classes):
        raise SystemExit(f"--n-classes {options.n_classes}: the data has {len(classes)} classes")


def fill_in(options: argparse.Namespace, data: ImageSet, device: torch.device) -> None:
    """Fill in the flags that were not given, and print why."""
    known = Known(
        images=len(data.train),
        classes=len(data.classes),
        typical=int(median(Counter(image.label for image in data.train).values())),
        side=short_side([image.path for image in data.train]),
        pretrained=not options.no_pretrained,
        gpu=device.type != "cpu",
        frozen=options.frozen,
    )
    choices = choose(known)
    if fixed := fixed_size(options.backbone or choices["backbone"][0]):
        choices["image_size"] = fixed, f"which the weights of {options.backbone} are for"
    for name, (value, why) in choices.items():
        given = getattr(options, name)
        value, why = (value, why) if given is None else (given, "as asked")
        setattr(options, name, value)
        print(f"{name} {value:{'g' if name == 'lr' else ''}}: {why}")
    if options.backbone_lr is None:
        options.backbone_lr = options.lr if options.no_pretrained else options.lr / 10


def measure(data: ImageSet, likely: Tensor, history: list[dict[str, float]]) -> dict[str, Any]:
    """What metrics.json has of the data and the training."""
    confusion = metrics.confusions([image.label for image in data.test], likely.argmax(1).tolist(), len(data.classes))
    return {
        **metrics.summary(confusion),
        "by_class": metrics.by_class(data.classes, [image.label for image in data.train], confusion),
        "confusion": confusion.tolist(),
        "classes": data.classes,
        "history": history,
        "minutes": sum(row["seconds"] for row in history) / 60,
    }


def write_predictions(file: Path, data: ImageSet, likely: Tensor) -> None:
    names, best = data.classes, likely.max(1)
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        rows = csv.writer(lines)
        rows.writerow(["path", "label", "predicted", "probability"])
        for image, share, row in zip(data.test, best.values.tolist(), best.indices.tolist(), strict=True):
            rows.writerow([image.path, names[image.label], names[row], f"{share:.4f}"])


if __name__ == "__main__":
    main()
