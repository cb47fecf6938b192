"""The head alone, on features of a frozen backbone that are computed once and kept: an epoch takes a moment.

python examples/frameworks/cached_features.py                                       # on drawn shapes
python examples/frameworks/cached_features.py --data DIR --backbone vit_small_patch14_dinov2.lvd142m --pretrained

DIR holds train/ and test/, each of class folders. Features are of images as a test takes them, without augmentation.
The cache is refused if it is of another backbone, other weights, other images or another transform.
"""

import argparse
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from toy import SIZE, Shapes, make_parser
from tqdm import tqdm

from apinet_head import APIHead, APINet, BalancedBatchSampler, api_loss


def make_net(args: argparse.Namespace, classes: int, size: int | None) -> APINet:
    # Some models are made for one size of images.
    config = timm.get_pretrained_cfg(args.backbone)
    settings = {"img_size": size} if size and config is not None and config.fixed_input_size else {}
    torch.manual_seed(0)
    try:
        return APINet(args.backbone, classes, pretrained=args.pretrained, backbone_args=settings)
    except Exception as error:  # of the backbone, the Hub's client, the network: each raises its own
        raise SystemExit(f"{args.backbone}: {' '.join(str(error).split())}") from None


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


def load_or_compute(
    path: Path, about: Mapping[str, str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of the file, which is written first if there is none; SystemExit if they are of something else."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")  # a run that is stopped leaves no half cache
        save_file(compute(), partial, metadata=dict(about))
        partial.replace(path)
    advice = "delete it, or pass another --cache"
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise SystemExit(f"{path}: not a cache of features ({error}); {advice}") from None
    changes = [f"{name} {found.get(name)} there, {new} here" for name, new in about.items() if new != found.get(name)]
    if changes:
        raise SystemExit(f"{path}: features of something else: {'; '.join(changes)}; {advice}")
    return tensors


@torch.inference_mode()
def features_of(backbone: nn.Module, images: Shapes | ImageFolder, device: str) -> Tensor:
    """[N,D], on the CPU, of all images in their order."""
    backbone.to(device).eval()
    loader = DataLoader(images, batch_size=32)
    return torch.cat([backbone(batch.to(device)).float().cpu() for batch, _ in tqdm(loader, desc="features")])


def digest_of_weights(module: nn.Module) -> str:
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_of_images(images: Shapes | ImageFolder) -> str:
    if isinstance(images, Shapes):
        return images.digest()
    total = hashlib.sha256("\n".join(images.classes).encode())
    for path, label in images.samples:
        total.update(f"{label} {Path(path).stat().st_size} ".encode())
        total.update(Path(path).read_bytes())
    return total.hexdigest()


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


def main(arguments: list[str] | None = None) -> float:
    parser = make_parser(__doc__)
    parser.set_defaults(epochs=50)
    parser.add_argument("--data", type=Path, help="default: drawn shapes")
    parser.add_argument("--pretrained", action="store_true", help="timm's weights; else random ones, by a fixed seed")
    parser.add_argument("--image-size", type=int, help="pixels a side (default: the backbone's own; 48 for shapes)")
    parser.add_argument("--cache", type=Path, default=Path("runs/features.safetensors"), help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="where to save backbone and head, for APINet.from_pretrained")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    train, test = open_images(args.data)
    size = args.image_size or (None if args.data else SIZE)
    net = make_net(args, len(train.classes), size)
    config = resolve_model_data_config(net.backbone)
    config |= {"input_size": (3, size, size), "crop_pct": 1.0} if size else {}
    train.transform = test.transform = create_transform(**config)
    about = {
        "backbone": args.backbone,
        "weights": digest_of_weights(net.backbone),
        "transform": " ".join(str(test.transform).split()),
        "training images": digest_of_images(train),
        "test images": digest_of_images(test),
    }
    both = {"train": train, "test": test}
    features = load_or_compute(
        args.cache, about, lambda: {name: features_of(net.backbone, images, device) for name, images in both.items()}
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
