"""Fine-tune on your own images: train_own.py DIR, a folder of class folders, or a CSV of path,label.

Writes a model folder with the net, its classes, its metrics, a model card and a report to look at (report.html).

python examples/train_own.py DIR
python examples/train_own.py DIR --backbone convnext_tiny --image-size 288 --out model
python examples/train_own.py DIR --baseline --out baseline     # plain cross-entropy, to compare with
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor

from workbench import model_folder
from workbench.confused import show_pairs
from workbench.datasets.bad_images import processors, shown
from workbench.datasets.folders import Split, by_class, read, short_side, sound, warnings
from workbench.defaults import Known, choose
from workbench.metrics import by_class as rows_by_class
from workbench.metrics import confusions, machine, summary
from workbench.own_training import Images, advice_on_memory, fit, fixed_size, make_net, probabilities, transforms
from workbench.report_page import write

NOT_SETTINGS = ("source", "out", "overwrite")


def number(kind: type, least: float) -> Callable[[str], Any]:
    """For argparse: a number that is not below `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="folder of class folders, with train/ and test/ in it or not; or a CSV")
    add("--out", type=Path, default=Path("own-model"), help="model folder (default: %(default)s)")
    add("--overwrite", action="store_true", help="write over the model in --out")
    add("--test-share", type=float, default=0.25, help="of each class, where there is no split (default: %(default)s)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be decoded")
    add("--baseline", action="store_true", help="plain cross-entropy, no pairs")
    add("--no-pretrained", action="store_true", help="train from scratch, without weights from the network")
    add("--seed", type=int, default=0, help="of split, batches, crops and weights (default: %(default)s)")
    add("--workers", type=number(int, 0), default=min(8, processors() - 1), help="processes that load images; 0: none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    chosen = parser.add_argument_group("chosen from the data, if not given")
    chosen.add_argument("--backbone", help="any timm model name")
    chosen.add_argument("--image-size", type=number(int, 32), help="pixels a side")
    chosen.add_argument("--n-classes", type=number(int, 2), help="classes in a batch")
    chosen.add_argument("--n-samples", type=number(int, 1), help="images of each of these")
    chosen.add_argument("--epochs", type=number(int, 1))
    chosen.add_argument("--lr", type=number(float, 0), help="learning rate of AdamW")
    chosen.add_argument("--backbone-lr", type=number(float, 0), help="of the backbone (a tenth of --lr if pretrained)")
    add("--weight-decay", type=number(float, 0), default=0.05, help="of AdamW (default: %(default)s)")
    add(
        "--chunk-size", type=number(int, 1), metavar="N",
        help="images at a time through the backbone: the same batch in less memory (default: all)",
    )  # fmt: skip
    return parser


def read_data(options: argparse.Namespace) -> tuple[Split, list[str]]:
    """The images and the classes, with notes and warnings printed.

    Raises:
        SystemExit: there is nothing to learn from them or to test with.
    """
    split = sound(read(options.source, options.test_share, options.seed), options.workers, options.skip_bad)
    classes = list(by_class(split.train))
    unknown = sorted(set(by_class(split.test)) - set(classes))
    if unknown:
        raise SystemExit(f"{options.source}: no training images of the test classes {', '.join(unknown)}")
    if len(classes) < 2:
        raise SystemExit(f"{options.source}: two classes or more are needed, got {', '.join(classes) or 'none'}")
    if not split.test:
        raise SystemExit(f"{options.source}: no class has two images, one to train with and one to test")
    print(f"{len(classes)} classes, {len(split.train)} training and {len(split.test)} test images")
    found = [*split.notes, *(f"warning: {text}" for text in warnings(split.train, split.test))]
    notes = [shown(note) for note in found]
    print("\n".join(notes))
    return split._replace(notes=notes), classes


def fill_in(options: argparse.Namespace, split: Split) -> None:
    """Choose what was not asked for, and say why."""
    sizes = [len(members) for members in by_class(split.train).values()]
    choices = choose(
        Known(
            images=len(split.train),
            classes=len(sizes),
            typical=int(median(sizes)),
            side=short_side(split.train),
            pretrained=not options.no_pretrained,
            gpu=options.device != "cpu",
        )
    )
    fixed = fixed_size(options.backbone or choices["backbone"][0])
    if fixed:
        choices["image_size"] = fixed, f"which the weights of {options.backbone} are for"
    for name, (value, why) in choices.items():
        given = getattr(options, name)
        if given is None:
            setattr(options, name, value)
        print(f"{name} {getattr(options, name):{'g' if name == 'lr' else ''}}: {why if given is None else 'as asked'}")
    if options.backbone_lr is None:
        options.backbone_lr = options.lr if options.no_pretrained else options.lr / 10
    if options.n_classes > len(sizes):
        raise SystemExit(f"--n-classes {options.n_classes}: the data has {len(sizes)} classes")


def measure(
    train: Images, test: Images, classes: list[str], likely: Tensor, split: Split, options: argparse.Namespace
) -> dict[str, Any]:
    """All that metrics.json has of a net that gives the test images these probabilities, but for its training."""
    confusion = confusions(test.labels, likely.argmax(1).tolist(), len(classes))
    return {
        **summary(confusion),
        "by_class": rows_by_class(classes, train.labels, confusion),
        "confusion": confusion.tolist(),
        "classes": classes,
        "machine": machine(options.device),
        "data": {
            "name": options.source.resolve().stem,
            "train": len(train),
            "test": len(test),
            "notes": split.notes,
        },
        "settings": {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not 0 < options.test_share < 1:
        parser.error(f"--test-share must be between 0 and 1, got {options.test_share}")
    model_folder.check_free(options.out, options.overwrite)
    if options.backbone:
        fixed_size(options.backbone)  # before all images are looked at, for it ends the command where there is none
    split, classes = read_data(options)
    fill_in(options, split)
    torch.manual_seed(options.seed)
    net, config = make_net(options, len(classes))
    net = net.to(options.device, memory_format=torch.channels_last)
    train_transform, settings = transforms(net, options.image_size)
    test_transform = create_transform(**settings)
    train, test = Images(split.train, classes, train_transform), Images(split.test, classes, test_transform)

    start = time.monotonic()
    with advice_on_memory(options):
        history = fit(net, train, test, options)
        likely = probabilities(net, test, options)
    took = {"history": history, "minutes": (time.monotonic() - start) / 60}

    metrics = {**measure(train, test, classes, likely, split, options), **took}
    net = net.cpu().eval()
    model_folder.save(options.out, net, config, {"classes": classes, "transform": settings}, metrics)
    model_folder.save_predictions(options.out / "predictions.csv", test, classes, likely)
    pairs = show_pairs(net, Images(split.train, classes, test_transform), test, likely, options)
    write(options.out / "report.html", metrics, pairs)
    low, high = metrics["accuracy_interval"]
    print(f"test accuracy {metrics['accuracy']:.1%} ({low:.1%} to {high:.1%}); {options.out / 'report.html'}")


if __name__ == "__main__":
    main()
