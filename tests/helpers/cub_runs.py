"""Runs and models of train_cub.py on a tiny set of birds, and what tells whether two runs are alike bit for bit."""

import csv
import itertools
import json
from dataclasses import asdict

import torch

import train_cub
from apinet_head import APINet
from workbench import model_folder
from workbench.checkpoint import load
from workbench.datasets.bird_lists import read_cub
from workbench.settings import parse

# All that a state can hold, and a checkpoint after each step; 3 epochs of 3 steps, and in the last no test but one.
FULL = ["--memory", "16", "--checkpoint-minutes", "1e-9", "--epochs", "3", "--inter", "random"]
TINY = [
    "--preset", "demo", "--backbone", "test_resnet", "--backbone-args", "{}", "--resize", "40", "--crop", "32",
    "--n-classes", "3", "--n-samples", "2", "--epochs", "3", "--eval-every", "2", "--device", "cpu",
]  # fmt: skip


def run(birds, output, *flags):
    return train_cub.main([*TINY, "--data", str(birds), "--output", str(output), *flags])


def begun(birds, *flags):
    """The settings of a run, and its net before the first step."""
    settings = parse([*TINY, "--data", str(birds), *flags])
    train_cub.set_seed(settings.seed)
    return settings, train_cub.make_net(settings, 6)


def save_untrained(birds, folder, *flags):
    """The model folder of a net as it begins, as train_cub.py writes it; its normalisation is not ImageNet's."""
    settings, net = begun(birds, "--backbone-args", '{"output_stride": 8}', *flags)  # whose last map is 4 x 4
    transform = {"squash": settings.resize, "crop": settings.crop, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    folder.mkdir(parents=True)
    model_folder.save(folder, model_folder.Model(net, read_cub(birds).classes, transform))
    (folder / "run.json").write_text(json.dumps({"metrics": {}, "settings": asdict(settings)}))
    return folder


class KilledError(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def at_call(patch, number, owner, name, action):
    """Have something done in a function's call of that number, before what the function does."""
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*args):
        if next(calls) == number:
            action()
        return function(*args)

    patch.setattr(owner, name, counted)


def weights(folder):
    return APINet.from_pretrained(folder).state_dict()


def rows(folder):
    """The log's, less how long an epoch took."""
    with (folder / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def end_state(folder, last):
    """All that a run leaves, and its newest checkpoint: optimiser, memory, random states and all; without times."""
    newest = max((folder / "state").iterdir())
    assert newest.name == last
    shared = load(newest / "state.pt") | {"progress": None}  # it has times in it, and else what the log has
    result = json.loads((folder / "result.json").read_text()) | {"seconds": 0}
    nets = [weights(folder / name) for name in ("last", "best")]
    return [*nets, rows(folder), result, shared, load(newest / "process-0.pt")]


def same(one, other):
    """Bit for bit, whatever it is made of."""
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_ends_alike(folder, whole, last="epoch-0003"):
    for one, other in zip(end_state(folder, last), end_state(whole, last), strict=True):
        assert same(one, other)
    assert not list(folder.rglob("*.partial"))
