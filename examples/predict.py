"""The likeliest classes of images, by a model folder that train_own.py wrote: predict.py MODEL IMAGE..."""

import argparse
from pathlib import Path

import torch
from timm.data import create_transform

from workbench.datasets.bad_images import shown
from workbench.image_files import BadImageError, load_image
from workbench.model_folder import load


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--top", type=int, default=3, help="classes of each image (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.top < 1:
        parser.error(f"--top must be at least 1, got {options.top}")
    net, classes, settings = load(options.model)
    transform = create_transform(**settings)
    for path in options.images:
        try:
            image = transform(load_image(path))
        except BadImageError as error:
            raise SystemExit(shown(str(error))) from None
        with torch.inference_mode():
            top = net(image[None])[0].softmax(0).topk(min(options.top, len(classes)))
        found = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        print(shown(str(path)), *(f"{classes[row]} {value:.4f}" for value, row in found), sep="  ", flush=True)


if __name__ == "__main__":
    main()
