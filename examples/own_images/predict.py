"""The likeliest classes of images, by a model folder that train.py wrote: predict.py MODEL IMAGE..."""

import argparse
import json
from pathlib import Path

import torch
from data import open_image
from timm.data import create_transform

from apinet_head import APINet


def load(folder: Path) -> tuple[APINet, list[str], dict]:
    if not (folder / "classes.json").is_file():
        raise SystemExit(f"{folder}: not a model folder of train.py, it has no classes.json")
    about = json.loads((folder / "classes.json").read_text())
    return APINet.from_pretrained(str(folder)).eval(), about["classes"], about["transform"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--top", type=int, default=3)
    args = parser.parse_args()
    net, classes, settings = load(args.model)
    transform = create_transform(**settings)
    for path in args.images:
        with torch.inference_mode():
            top = net(transform(open_image(path))[None])[0].softmax(0).topk(min(args.top, len(classes)))
        print(
            path,
            *(f"{classes[i]} {p:.4f}" for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)),
            sep="  ",
        )


if __name__ == "__main__":
    main()
