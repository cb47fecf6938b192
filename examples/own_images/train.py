"""Fine-tune on your own images: train.py DIR, a folder of class folders, or a CSV of path,label.

Writes a model folder with the net, its classes, its metrics and a report to look at.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import data
import report
import torch
import torch.nn.functional as F
from defaults import choose
from timm.data import create_transform, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apinet_head import APINet, BalancedBatchSampler, api_loss


class Images(Dataset[tuple[Tensor, int]]):
    """Transformed images [3,H,W], and the rows of their classes."""

    def __init__(self, items: list[data.Item], classes: list[str], transform: Any) -> None:
        self.items, self.transform = items, transform
        self.labels = [classes.index(item.label) for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(data.open_image(self.items[index].path)), self.labels[index]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of class folders, with train/ and test/ in it or not; or CSV")
    parser.add_argument("--out", type=Path, default=Path("own-model"), help="model folder (default: %(default)s)")
    parser.add_argument("--backbone", help="any timm model name")
    parser.add_argument("--image-size", type=int, help="pixels a side")
    parser.add_argument("--n-classes", type=int, help="classes in a batch")
    parser.add_argument("--n-samples", type=int, help="images of each of these")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of split, batches and weights (default: %(default)s)")
    parser.add_argument("--no-pretrained", action="store_true", help="train from scratch")
    parser.add_argument("--baseline", action="store_true", help="plain cross-entropy, no pairs")
    return parser.parse_args()


def read(args: argparse.Namespace) -> tuple[list[data.Item], list[data.Item], list[str]]:
    """Training images, test images and classes, with a warning printed for all that looks wrong."""
    train, test = data.read(args.source, seed=args.seed)
    classes = sorted(data.by_class(train))
    if len(classes) < 2 or not {item.label for item in test} <= set(classes):
        raise SystemExit(f"{args.source}: two classes or more are needed, and each test class in training: {classes}")
    if not test:
        raise SystemExit(f"{args.source}: no class has two images, one to train with and one to test")
    for warning in data.warnings(train, test):
        print("warning:", warning)
    return train, test, classes


def fill_in(args: argparse.Namespace, images: int, classes: int) -> None:
    """Choose what was not asked for, and say why."""
    for name, (value, why) in choose(images, classes).items():
        given = getattr(args, name) is not None
        setattr(args, name, getattr(args, name) if given else value)
        print(f"{name} {getattr(args, name)}: {'as asked' if given else why}")


def fit(net: APINet, train: Images, args: argparse.Namespace, device: str) -> list[float]:
    """The mean training loss of each epoch."""
    sampler = BalancedBatchSampler(train.labels, args.n_classes, args.n_samples, seed=args.seed)
    loader = DataLoader(train, batch_sampler=sampler)
    optimizer = torch.optim.AdamW(net.parameter_groups(args.lr))
    schedule = CosineLRScheduler(optimizer, t_initial=args.epochs)
    history = []
    net.train()
    for epoch in tqdm(range(args.epochs), desc="epochs"):
        sampler.set_epoch(epoch)
        schedule.step(epoch)
        losses = []
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            loss = F.cross_entropy(net(images), labels) if args.baseline else api_loss(net(images, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
    return history


@torch.inference_mode()
def predict(net: nn.Module, images: Images) -> list[int]:
    """The likeliest class of each image."""
    return torch.cat([net(batch).argmax(1) for batch, _ in DataLoader(images, batch_size=32)]).tolist()


def confusions(labels: list[int], predicted: list[int], classes: int) -> Tensor:
    """[C,C]: how many images of the row's class were taken for the column's."""
    pairs = torch.tensor(labels) * classes + torch.tensor(predicted)
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def figures(net: APINet, test: Images, predicted: list[int], classes: list[str], stats: dict[str, Any]) -> list[str]:
    """The first six wrong images, each beside an image of the class that it was taken for."""
    wrong = [(row, other) for row, other in enumerate(predicted) if other != test.labels[row] and other in test.labels]
    found = []
    for row, other in wrong[:6]:
        pair = torch.stack([test[row][0], test[test.labels.index(other)][0]])
        caption = f"{classes[test.labels[row]]}, taken for {classes[other]}, and an image of that"
        found.append(report.pair_figure(net, pair, caption, **stats))
    return found


def main() -> None:
    args = parse()
    train_items, test_items, classes = read(args)
    fill_in(args, len(train_items), len(classes))
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = APINet(args.backbone, len(classes), pretrained=not args.no_pretrained).to(device)
    config = resolve_model_data_config(net.backbone)
    stats = {name: list(config[name]) for name in ("mean", "std")}
    settings = {"input_size": [3, args.image_size, args.image_size], "crop_pct": 1.0, **stats}
    train = Images(train_items, classes, create_transform(**settings, is_training=True))
    test = Images(test_items, classes, create_transform(**settings))

    history = fit(net, train, args, device)
    predicted = predict(net.cpu().eval(), test)
    confusion = confusions(test.labels, predicted, len(classes))
    accuracy = confusion.diagonal().sum().item() / len(test)

    # Without `pretrained`, so that loading the folder asks for no weights but those in it.
    net.save_pretrained(args.out, config={"backbone": args.backbone, "num_classes": len(classes)})
    (args.out / "classes.json").write_text(json.dumps({"classes": classes, "transform": settings}))
    metrics = {"accuracy": accuracy, "confusion": confusion.tolist(), "loss": history}
    (args.out / "metrics.json").write_text(json.dumps(metrics))
    pictures = [] if args.baseline else figures(net, test, predicted, classes, stats)
    report.write(args.out / "report.html", classes, confusion, history, pictures)
    print(f"test accuracy {accuracy:.1%}; {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
