"""Predict the most probable classes of images, or of all images in a folder, with a model of either training.

python examples/predict.py own-model photo.jpg other.png
python examples/predict.py own-model DIR --csv predictions.csv
python examples/predict.py runs/CUB_200_2011-api-resnet101-seed0/last DIR --top 5 --device cuda --batch-size 128

Images that can't be decoded are named and skipped, and the exit status is then 1.
"""

import csv
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from workbench import DEVICE, Command, counted, model_folder, number, processors, shown, writing
from workbench.datasets.folders import SUFFIXES, images_below
from workbench.guard import check_device
from workbench.image_files import BadImageError, load_image
from workbench.images import eval_transform
from workbench.model_folder import Model


def find_images(sources: list[Path]) -> list[Path]:
    """The files given, and all images in and below the folders given, sorted by name."""
    paths = []
    for source in sources:
        if not source.exists():
            raise SystemExit(f"{shown(str(source))}: no such file or folder")
        found = images_below(source) if source.is_dir() else [source]
        if not found:
            raise SystemExit(f"{shown(str(source))}: no images ({', '.join(sorted(SUFFIXES))}) in this folder")
        paths += found
    return paths


def load_batch(transform: Any, paths: list[Path]) -> list[tuple[Path, Tensor | BadImageError]]:
    """(path, image) for each, and for files that can't be decoded (path, error)."""
    found = []
    for path in paths:
        try:
            found.append((path, transform(load_image(path))))
        except BadImageError as error:
            found.append((path, error))
    return found


def classify(model: Model, loader: Iterable[Any], top: int, device: torch.device) -> Iterator[tuple[Path, Any]]:
    """For each image its most probable classes, (name, probability), or the error if it can't be decoded."""
    net, classes = model.net.to(device), model.classes
    for batch in loader:
        found = {path: error for path, error in batch if isinstance(error, BadImageError)}
        if good := [(path, image) for path, image in batch if path not in found]:
            with torch.inference_mode():
                best = net(torch.stack([image for _, image in good]).to(device)).softmax(1).topk(min(top, len(classes)))
            for (path, _), values, rows in zip(good, best.values.tolist(), best.indices.tolist(), strict=True):
                found[path] = [(classes[row], value) for row, value in zip(rows, values, strict=True)]
        yield from ((path, found[path]) for path, _ in batch)


def main(arguments: list[str] | None = None) -> int:
    parser = Command(__doc__)
    parser.add_argument("model", type=Path, help="model folder of train_own.py or train_cub.py")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, or folders of images")
    parser.add_argument("--top", type=number(int, 1), default=3, help="classes of each image")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table to this file instead of printing lines")
    add, workers = parser.add_argument, min(8, processors() - 1)
    add("--batch-size", type=number(int, 1), default=32, help="images at a time")
    add("--workers", type=number(int, 0), default=workers, help="processes that load images")
    parser.add_argument("--device", **DEVICE)
    options = parser.parse_args(arguments)
    device = check_device(options.device)
    paths = find_images(options.images)
    model = model_folder.load(options.model)
    workers = options.workers if len(paths) > options.batch_size else 0  # a few images are quicker without
    load = partial(load_batch, eval_transform(model.transform))  # in the workers
    loader = DataLoader(paths, options.batch_size, num_workers=workers, collate_fn=load)
    bad = 0
    with open_table(options.csv, min(options.top, len(model.classes))) if options.csv else nullcontext() as table:
        bar = tqdm(loader, desc="predicting", unit=" batches", disable=table is None)
        for path, found in classify(model, bar, options.top, device):
            if isinstance(found, BadImageError):
                bad += 1
                tqdm.write(shown(str(found)), file=sys.stderr)  # above the bar
            elif table:
                table.writerow([path, *(cell for name, value in found for cell in (name, f"{value:.4f}"))])
            else:
                print(shown(str(path)), *(f"{name} {value:.4f}" for name, value in found), sep="  ", flush=True)
    if options.csv:
        print(f"{counted(len(paths) - bad, 'image')}: {options.csv}")
    if bad:
        print(f"{bad} of {counted(len(paths), 'image')} cannot be decoded", file=sys.stderr)
    return int(bad > 0)


@contextmanager
def open_table(file: Path, top: int) -> Iterator[Any]:
    """A csv writer that has written the header."""
    # Paths may not be valid UTF-8.
    with writing("--csv", file), file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        table = csv.writer(lines)
        others = [name for place in range(2, top + 1) for name in (f"predicted_{place}", f"probability_{place}")]
        table.writerow(["path", "predicted", "probability", *others])
        yield table


if __name__ == "__main__":
    sys.exit(main())
