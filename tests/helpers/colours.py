"""A folder of colours in three classes, flags of train_own.py for a tiny net on them, and what a model says."""

import json
import random

import torch
from PIL import Image
from timm.data import create_transform

from apinet_head import APINet

COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}
FLAGS = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0"]
SHORT = [*FLAGS, "--no-pretrained", "--epochs", "1"]


def write_colours(root):
    """9 noisy images of each to train with, and 3 to test, among which a red image is in the folder of green ones."""
    rng = random.Random(0)
    for part, count in {"train": 9, "test": 3}.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = bytes(value + rng.randint(-15, 15) for value in 40 * 40 * colour)
                Image.frombytes("RGB", (40, 40), pixels).save(root / part / name / f"{index}.png")
    Image.new("RGB", (40, 40), COLOURS["red"]).save(root / "test/green/wrong.png")
    return root


def prepared(model, path):
    """The image of a path by the transform that a model folder of train_own.py names."""
    return create_transform(**json.loads((model / "classes.json").read_text())["transform"])(Image.open(path))


def probabilities(model, image):
    """Of a prepared image, by the net of a model folder."""
    with torch.inference_mode():
        return APINet.from_pretrained(model).eval()(image[None])[0].softmax(0)
