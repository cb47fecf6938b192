"""Fine-tune on your own images: train.py DIR, a folder of class folders, or a CSV of path,label."""

import argparse
import json
from pathlib import Path

import data
import report
import torch
import torch.nn.functional as F
from defaults import choose
from timm.data import create_transform, resolve_model_data_config
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from apinet_head import APINet, BalancedBatchSampler, api_loss


class Images(Dataset):
    def __init__(self, items, classes, transform):
        self.items, self.transform = items, transform
        self.labels = [classes.index(item.label) for item in items]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.transform(data.open_image(self.items[index].path)), self.labels[index]


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("own-model"))
    parser.add_argument("--backbone")
    for flag in ("image-size", "n-classes", "n-samples", "epochs"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-pretrained", action="store_true", help="train from scratch")
    parser.add_argument("--baseline", action="store_true", help="plain cross-entropy, no pairs")
    return parser.parse_args()


def fit(net, train, args, device):
    sampler = BalancedBatchSampler(train.labels, args.n_classes, args.n_samples, seed=args.seed)
    loader = DataLoader(train, batch_sampler=sampler)
    optimizer = torch.optim.AdamW(net.parameter_groups(args.lr))
    schedule = CosineLRScheduler(optimizer, t_initial=args.epochs)
    history = []
    for epoch in tqdm(range(args.epochs)):
        sampler.set_epoch(epoch)
        schedule.step(epoch)
        losses = []
        net.train()
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            if args.baseline:
                loss = F.cross_entropy(net.head.classifier(net.backbone(images)), labels)
            else:
                loss = api_loss(net(images, labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        history.append(sum(losses) / len(losses))
    return history


def main():
    args = parse()
    train_items, test_items = data.read(args.source, seed=args.seed)
    classes = sorted(data.by_class(train_items))
    if len(classes) < 2 or not {item.label for item in test_items} <= set(classes):
        raise SystemExit(f"{args.source}: two classes or more are needed, and each test class in training: {classes}")
    if not test_items:
        raise SystemExit(f"{args.source}: no class has two images, one to train with and one to test")
    for warning in data.warnings(train_items, test_items):
        print("warning:", warning)
    for name, (value, why) in choose(len(train_items), len(classes)).items():
        given = getattr(args, name) is not None
        setattr(args, name, getattr(args, name) if given else value)
        print(f"{name} {getattr(args, name)}: {'as asked' if given else why}")
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = APINet(args.backbone, len(classes), pretrained=not args.no_pretrained).to(device)
    config = resolve_model_data_config(net.backbone)
    stats = {name: list(config[name]) for name in ("mean", "std")}
    settings = {"input_size": [3, args.image_size, args.image_size], "crop_pct": 1.0, **stats}
    train = Images(train_items, classes, create_transform(**settings, is_training=True))
    test = Images(test_items, classes, create_transform(**settings))
    history = fit(net, train, args, device)
    net.cpu().eval()
    with torch.inference_mode():
        predicted = torch.cat([net(images).argmax(1) for images, _ in DataLoader(test, batch_size=32)])
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)
    figures = []
    for index, (label, other) in enumerate(zip(test.labels, predicted.tolist(), strict=True)):
        confusion[label, other] += 1
        if label != other and len(figures) < 6 and not args.baseline:
            pair = torch.stack(
                [test[index][0], test[test.labels.index(other)][0] if other in test.labels else test[index][0]]
            )
            caption = f"{classes[label]}, taken for {classes[other]}, and an image of that"
            figures.append(report.pair_figure(net, pair, caption, **stats))
    net.save_pretrained(args.out, config={"backbone": args.backbone, "num_classes": len(classes)})
    (args.out / "classes.json").write_text(json.dumps({"classes": classes, "transform": settings}))
    accuracy = confusion.diagonal().sum().item() / len(test)
    metrics = {"accuracy": accuracy, "confusion": confusion.tolist(), "loss": history}
    (args.out / "metrics.json").write_text(json.dumps(metrics))
    report.write(args.out / "report.html", classes, confusion, history, figures)
    print(f"test accuracy {accuracy:.1%}; {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
