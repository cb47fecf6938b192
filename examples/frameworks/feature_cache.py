"""Features of images by a frozen backbone, in a file that says what they are of."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from toy import Shapes
from tqdm import tqdm


def load_or_compute(
    path: Path, about: Mapping[str, str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of the file, which is written first if there is none.

    Raises:
        SystemExit: the file is about something else, or none of these.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")  # a run that is stopped leaves no half cache
        save_file({name: tensor.contiguous() for name, tensor in compute().items()}, partial, metadata=dict(about))
        partial.replace(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError) as error:
        raise SystemExit(f"{path}: not a cache of features ({error}); delete it, or pass another --cache") from None
    different = [
        f"{name} {found.get(name)} there, {value} here" for name, value in about.items() if value != found.get(name)
    ]
    if different:
        advice = "delete it, or pass another --cache"
        raise SystemExit(f"{path}: features of something else: {'; '.join(different)}; {advice}")
    return tensors


@torch.inference_mode()
def features_of(backbone: nn.Module, images: Shapes | ImageFolder, device: str) -> Tensor:
    """[N,D], on the CPU, of all images in their order."""
    backbone.to(device).eval()
    loader = DataLoader(images, batch_size=32)
    return torch.cat([backbone(batch.to(device)).float().cpu() for batch, _ in tqdm(loader, desc="features")])


def digest_of_weights(module: nn.Module) -> str:
    """The same for the same names and values alone."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest_of_images(images: Shapes | ImageFolder) -> str:
    """The same for the same pictures and classes in the same order alone."""
    if isinstance(images, Shapes):
        return images.digest()
    total = hashlib.sha256("\n".join(images.classes).encode())
    for path, label in images.samples:
        total.update(f"{label} {Path(path).stat().st_size} ".encode())
        total.update(Path(path).read_bytes())
    return total.hexdigest()
