"""A folder of plain colours in three classes, and flags of train_own.py for a tiny net on them."""

import random

from PIL import Image

COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}
FLAGS = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0"]
SHORT = [*FLAGS, "--no-pretrained", "--epochs", "1"]


def write_colours(root):
    """9 images of each to train with, and 3 to test, among which a red image is in the folder of green ones."""
    rng = random.Random(0)
    for part, count in {"train": 9, "test": 3}.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                shade = tuple(value + rng.randint(-15, 15) for value in colour)
                Image.new("RGB", (40, 40), shade).save(root / part / name / f"{index}.png")
    Image.new("RGB", (40, 40), COLOURS["red"]).save(root / "test/green/wrong.png")
    return root
