"""Features of a frozen backbone, computed once for each image and cached on disk."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from workbench.datasets import Image, cache_folder
from workbench.images import ImageDataset, eval_transform


def features_of(
    backbone: nn.Module, images: Sequence[Image], transform: Mapping[str, Any], device: torch.device, workers: int = 0
) -> Tensor:
    """Features [N,D] on the CPU of images prepared as for testing; only those not seen before are computed.

    They are cached in the user's cache folder, in a file for each backbone, weights and transform, by the content of
    the images: another split, or moving the files, recomputes nothing. Leaves the backbone in eval mode.
    """
    file = cache_folder() / "features" / f"{_digest_of(backbone, transform)}.safetensors"
    try:
        known = load_file(file)
    except (OSError, SafetensorError):  # there is none yet, or it is damaged
        known = {}
    names = [hashlib.sha256(image.path.read_bytes()).hexdigest() for image in images]
    new = {name: image for name, image in zip(names, images, strict=True) if name not in known}
    if new:
        dataset = ImageDataset(list(new.values()), eval_transform(transform))
        # With its own generator, the loader draws nothing from that of the training.
        loader = DataLoader(dataset, 32, num_workers=workers, generator=torch.Generator())
        backbone.to(device).eval()
        with torch.inference_mode():
            batches = [backbone(batch.to(device)).float().cpu() for batch, *_ in tqdm(loader, desc="features")]
        known |= dict(zip(new, torch.cat(batches), strict=True))
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")  # an interrupted run leaves no partial file
        save_file({name: value.clone() for name, value in known.items()}, partial)
        partial.replace(file)
    return torch.stack([known[name] for name in names])


def feature_loader(images: Sequence[Image], features: Tensor, batches: Iterable[list[int]]) -> DataLoader[Any]:
    """(features, labels, indices) of these batches of rows, as a loader of the images gives them."""
    rows = TensorDataset(features, torch.tensor([image.label for image in images]), torch.arange(len(images)))
    return DataLoader(rows, batch_sampler=batches, generator=torch.Generator())


def _digest_of(backbone: nn.Module, transform: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps([repr(backbone), transform], sort_keys=True).encode())
    for name, value in backbone.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]
