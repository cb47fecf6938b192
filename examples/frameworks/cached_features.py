"""The head alone, on features of a frozen backbone that are computed once and kept: an epoch takes a moment.

python examples/frameworks/cached_features.py                                       # on drawn shapes
python examples/frameworks/cached_features.py --data DIR --backbone vit_small_patch14_dinov2.lvd142m --pretrained

DIR holds train/ and test/, each of class folders. Features are of images as a test takes them, without augmentation.
The cache is refused if it is of another backbone, other weights, other images or another transform.
"""

import argparse
from pathlib import Path

import timm
import torch
from feature_cache import digest_of_images, digest_of_weights, features_of, load_or_compute
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.datasets import ImageFolder
from toy import SIZE, Shapes

from apinet_head import APIHead, APINet, BalancedBatchSampler, api_loss


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="default: drawn shapes")
    parser.add_argument("--backbone", default="test_resnet", help="any timm model name (default: %(default)s)")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; else random ones, by a fixed seed")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: the backbone's own; 48 for shapes)")
    parser.add_argument("--cache", type=Path, default=Path("runs/features.safetensors"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, help="where to save backbone and head, for APINet.from_pretrained")
    return parser.parse_args(arguments)


def train_head(head: APIHead, features: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    sampler = BalancedBatchSampler(labels, n_classes=min(30, len(labels.unique())), n_samples=4)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr)
    head.train()
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for batch in sampler:
            loss = api_loss(head(features[batch], labels[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"epoch {args.epochs}: loss of the last batch {loss.item():.3f}")


def open_images(folder: Path | None) -> list[Shapes] | list[ImageFolder]:
    """The training and the test images."""
    if folder is None:
        return [Shapes(train=True), Shapes(train=False)]
    try:
        train, test = (ImageFolder(folder / part) for part in ("train", "test"))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    if train.classes != test.classes:
        raise SystemExit(f"{folder}: train and test differ in classes {sorted({*train.classes} ^ {*test.classes})}")
    return [train, test]


def main(arguments: list[str] | None = None) -> float:
    args = parse(arguments)
    train, test = open_images(args.data)
    size = args.image_size or (None if args.data else SIZE)
    # Some models are made for one size of images.
    fixed = size and timm.get_pretrained_cfg(args.backbone).fixed_input_size
    torch.manual_seed(0)
    net = APINet(
        args.backbone, len(train.classes), pretrained=args.pretrained, backbone_args={"img_size": size} if fixed else {}
    )
    config = resolve_model_data_config(net.backbone)
    config |= {"input_size": (3, size, size), "crop_pct": 1.0} if size else {}
    train.transform = test.transform = create_transform(**config)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "backbone": args.backbone,
        "weights": digest_of_weights(net.backbone),
        "transform": " ".join(str(test.transform).split()),
        "training images": digest_of_images(train),
        "test images": digest_of_images(test),
    }
    features = load_or_compute(
        args.cache,
        about,
        lambda: {
            name: features_of(net.backbone, images, device) for name, images in (("train", train), ("test", test))
        },
    )
    torch.manual_seed(0)  # the same head, whether the features were computed now or earlier
    train_head(net.head.to(device), features["train"].to(device), torch.tensor(train.targets, device=device), args)
    with torch.no_grad():
        predicted = net.head.eval()(features["test"].to(device)).argmax(1).cpu()
    found = (predicted == torch.tensor(test.targets)).float().mean().item()
    print(f"test accuracy {found:.1%}")
    if args.out:
        net.save_pretrained(args.out)
    return found


if __name__ == "__main__":
    main()
