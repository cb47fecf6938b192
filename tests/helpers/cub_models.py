"""Models of train_cub.py that have learnt nothing, to run commands on."""

import json
from dataclasses import asdict

import torch

from train_cub import make_net
from workbench import model_folder
from workbench.datasets.bird_lists import read_cub
from workbench.settings import parse

# A net whose last map is 4 x 4.
FLAGS = [
    "--preset", "demo", "--backbone", "test_resnet", "--backbone-args", '{"output_stride": 8}', "--resize", "40",
    "--crop", "32", "--n-classes", "3", "--n-samples", "2", "--device", "cpu",
]  # fmt: skip


def save_untrained(birds, folder, *flags):
    """The model folder of a net as it begins, as train_cub.py writes it; its normalisation is not ImageNet's."""
    settings = parse([*FLAGS, "--data", str(birds), *flags])
    torch.manual_seed(0)
    classes = read_cub(birds).classes
    transform = {"squash": settings.resize, "crop": settings.crop, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    folder.mkdir(parents=True)
    model = model_folder.Model(make_net(settings, len(classes)), classes, transform)
    model_folder.save(folder, model)
    (folder / "run.json").write_text(json.dumps({"metrics": {}, "settings": asdict(settings)}))
    return folder
