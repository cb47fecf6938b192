"""Features of a frozen backbone, computed once for each image and kept on disk."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from workbench.datasets import Image, cache_folder
from workbench.images import ImageDataset, eval_transform


def features_of(
    backbone: nn.Module, images: Sequence[Image], transform: Mapping[str, Any], device: torch.device, workers: int = 0
) -> Tensor:
    """Features [N,D] on the CPU of images prepared as for testing; only those not seen before are computed.

    They are kept in the user's cache folder, in a file for each backbone, weights and transform, by the content of the
    images: another split of the same images, or images that moved, need nothing anew.

    Args:
        backbone: maps images to [B,D]; left in eval mode.
        transform: as of a model folder, see `images.eval_transform`.
    """
    file = cache_folder() / "features" / f"{_digest_of(backbone, transform)}.safetensors"
    known = _read(file)
    names = [hashlib.sha256(image.path.read_bytes()).hexdigest() for image in images]
    new = {name: image for name, image in zip(names, images, strict=True) if name not in known}
    if new:
        dataset = ImageDataset(list(new.values()), eval_transform(transform))
        # With a generator of its own, a loader draws nothing from that of the training to come.
        loader = DataLoader(dataset, 32, num_workers=workers, generator=torch.Generator())
        backbone.to(device).eval()
        with torch.inference_mode():
            batches = [backbone(batch.to(device)).float().cpu() for batch, *_ in tqdm(loader, desc="features")]
        known |= dict(zip(new, torch.cat(batches), strict=True))
        _write(file, known)
    return torch.stack([known[name] for name in names])


class FeatureBatches:
    """(features, labels, indices) of batches of rows, as a loader of images gives them.

    Args:
        images: whose labels these are.
        features: [N,D], of these images.
        batches: lists of rows, such as a sampler; None for all rows in order.
    """

    def __init__(self, images: Sequence[Image], features: Tensor, batches: Iterable[list[int]] | None = None) -> None:
        self.features, self.labels = features, torch.tensor([image.label for image in images])
        self.batches = [list(range(len(images)))] if batches is None else batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for rows in self.batches:
            yield self.features[rows], self.labels[rows], torch.tensor(rows)


def _digest_of(backbone: nn.Module, transform: Mapping[str, Any]) -> str:
    total = hashlib.sha256(json.dumps([repr(backbone), transform], sort_keys=True).encode())
    for name, value in backbone.state_dict().items():
        total.update(name.encode())
        total.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError):  # none yet, or a damaged one: it is made again
        return {}


def _write(file: Path, features: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")  # a run that is stopped leaves no half file
    save_file({name: value.clone() for name, value in features.items()}, partial)
    partial.replace(file)
