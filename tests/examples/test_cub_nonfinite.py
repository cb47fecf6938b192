"""Steps of train.py that are not finite: they end the run with all that replays them, or are left out."""

import csv
import json
import math

import pytest
import torch
from cub_runs import FULL, TINY, alike, run, same, weights

import train_cub as train
from workbench.checkpoint import unpack
from workbench.datasets.birds_cache import open_data
from workbench.guard import NonFiniteError
from workbench.images import ImageDataset
from workbench.run_folder import RunFolder
from workbench.settings import parse

BROKEN = 8  # of 18 training images: with seeds 0 and 1 it comes once in each of the three epochs


@pytest.fixture
def broken_image(monkeypatch):
    get = ImageDataset.__getitem__

    def broken(self, index):
        image, label, index = get(self, index)
        return (
            (image * math.inf if index == BROKEN and len(self) == 18 and self.transform.is_train else image),
            label,
            index,
        )

    def marked(*sizes, transform=train.train_transform):
        made = transform(*sizes)
        made.is_train = True
        return made

    monkeypatch.setattr(train, "train_transform", marked)
    monkeypatch.setattr(ImageDataset, "__getitem__", broken)
    monkeypatch.setattr("torchvision.transforms.Compose.is_train", False, raising=False)


def trainer(birds, output, *flags):
    settings = parse([*TINY, "--data", str(birds), *flags])
    return train.Trainer(settings, open_data(settings), RunFolder(output, settings))


def test_the_run_ends_with_what_replays_the_step(birds, tmp_path, broken_image, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(birds, tmp_path / "run", *FULL, "--seed", "1")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    (dump,) = (tmp_path / "run" / "nonfinite").iterdir()
    done = json.loads((dump / "progress.json").read_text())["step"]
    assert (
        f"step {done + 1} (epoch 1, batch {done + 1}) is not finite: loss nan, cross_entropy nan, ranking nan" in said
    )
    batch = unpack(dump / "batch-0.pt")
    data = open_data(parse([*TINY, "--data", str(birds)]))
    assert str(data.train[BROKEN].path) in batch["paths"]
    assert all(f"  {path}\n" in said for path in batch["paths"])
    place = batch["paths"].index(str(data.train[BROKEN].path))
    assert [not image.isfinite().all() for image in batch["images"]] == [i == place for i in range(6)]
    assert batch["labels"][place] == data.train[BROKEN].label
    assert json.loads(batch["settings"])["seed"] == 1

    assert done > 0
    before = max((tmp_path / "run" / "state").iterdir())  # the checkpoint after the step before
    states = [unpack(path / "state.pt") for path in (dump, before)]
    for group in (group for state in states for group in state["optimizer"]["param_groups"]):
        group["lr"] = None  # the step's own already
    assert alike(*states)
    assert alike(unpack(dump / "process-0.pt")["random"], unpack(before / "process-0.pt")["random"])

    one = trainer(birds, tmp_path / "replay", *FULL, "--seed", "1")
    one.state.load(dump)
    one.model.train()
    with pytest.raises(NonFiniteError, match="loss nan"):
        one.step(batch["images"], batch["labels"])


def test_steps_are_left_out_up_to_the_limit(birds, tmp_path, broken_image, monkeypatch, capsys):
    flags = ["--dropout", "0"]  # then a step left out uses no chance
    with pytest.raises(SystemExit):
        run(birds, tmp_path / "run", *flags, "--skip-nonfinite", "2")
    captured = capsys.readouterr()
    assert captured.out.count("is left out") == 2
    assert "(epoch 3, batch " in captured.err
    run(birds, tmp_path / "run", *flags, "--skip-nonfinite", "3")
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    assert all(math.isfinite(float(row["loss"])) for row in rows)

    # As if those batches were not trained on at all.
    step = train.Trainer.step

    def leave_out(self, images, labels):
        if not images.isfinite().all():
            raise NonFiniteError
        return step(self, images, labels)

    monkeypatch.setattr(train.Trainer, "step", leave_out)
    run(birds, tmp_path / "other", *flags, "--skip-nonfinite", "3")
    assert same(weights(tmp_path / "run" / "last"), weights(tmp_path / "other" / "last"))
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "last").values())


@pytest.mark.parametrize("method", ["api", "baseline"])
def test_gradients_that_are_not_finite_reach_no_weight(birds, tmp_path, method):
    one = trainer(birds, tmp_path / "run", "--method", method)
    one.model.train()
    images, labels, _ = next(iter(one.loader))
    one.step(images, labels)
    before = {name: value.clone() for name, value in one.net.named_parameters()}
    weight = list(one.net.head.parameters())[-1]
    handle = weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"norm of the gradients (nan|inf)"):
        one.step(images, labels)
    assert same(dict(one.net.named_parameters()), before)
    handle.remove()
    assert torch.isfinite(one.step(images, labels)["loss"])
