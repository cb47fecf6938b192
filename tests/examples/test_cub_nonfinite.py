"""Steps of train_cub.py that are not finite: they end the run with the images' paths, or are left out."""

import json
import math

import pytest
from cub_runs import FULL, TINY, rows, run, same, weights

import train_cub
from workbench.datasets import open_data
from workbench.images import AugmentedImages
from workbench.settings import parse

BROKEN = 8  # of 18 training images: with seeds 0 and 1 it comes once in each of the three epochs


@pytest.fixture
def broken_image(monkeypatch):
    """In training, not in the test."""
    get = AugmentedImages.__getitem__

    def broken(self, place):
        image, label, index = get(self, place)
        return image * math.inf if index == BROKEN else image, label, index

    monkeypatch.setattr(AugmentedImages, "__getitem__", broken)


def test_the_run_ends_with_the_paths_and_no_weight_is_changed(birds, tmp_path, broken_image, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(birds, tmp_path / "run", *FULL, "--seed", "1")
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    newest = max((tmp_path / "run" / "state").iterdir())  # the checkpoint after the step before
    done = int(newest.name.rpartition("-")[2])
    assert done > 0
    step = f"step {done + 1} (epoch 1, batch {done + 1})"
    assert f"{step} is not finite: loss nan, cross_entropy nan, ranking nan" in said
    data = open_data(parse([*TINY, "--data", str(birds)]))
    assert f"  {data.train[BROKEN].path}\n" in said
    assert said.count(".jpg\n") == 6
    assert "--skip-nonfinite 10" in said


def test_steps_are_left_out_up_to_the_limit(birds, tmp_path, broken_image, monkeypatch, capsys):
    flags = ["--dropout", "0"]  # then a step left out draws no random numbers
    with pytest.raises(SystemExit):
        run(birds, tmp_path / "run", *flags, "--skip-nonfinite", "2")
    captured = capsys.readouterr()
    assert captured.out.count("is skipped") == 2
    assert "(epoch 3, batch " in captured.err
    run(birds, tmp_path / "run", *flags, "--skip-nonfinite", "3")
    log = rows(tmp_path / "run")
    assert [(row["skipped"], row["step"]) for row in log] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert all(math.isfinite(float(row["loss"])) for row in log)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped"] == 3
    assert all(value.isfinite().all() for value in weights(tmp_path / "run" / "last").values())

    # As if those batches had never been trained on: their images don't even go through the net.
    compute_loss = train_cub.compute_loss

    def leave_out(model, images, labels, settings):
        if images.isfinite().all():
            return compute_loss(model, images, labels, settings)
        nothing = sum(parameter.sum() * 0 for parameter in model.parameters())
        return dict.fromkeys(("loss", "cross_entropy", "ranking", "train_top1"), nothing + math.nan)

    monkeypatch.setattr(train_cub, "compute_loss", leave_out)
    run(birds, tmp_path / "other", *flags, "--skip-nonfinite", "3")
    assert same(weights(tmp_path / "run" / "last"), weights(tmp_path / "other" / "last"))


@pytest.mark.parametrize("method", ["api", "baseline"])
def test_gradients_that_are_not_finite_end_the_run(birds, tmp_path, monkeypatch, method):
    """The loss is finite, its gradient is not; what the checkpoint has is from before."""
    calls, make_net = [], train_cub.make_net

    def overflow(gradient):
        calls.append(0)
        return gradient * (math.inf if len(calls) == 2 else 1)

    def watched(*args):
        net = make_net(*args)
        net.head.classifier.weight.register_hook(overflow)
        return net

    def end_all(message, code):
        raise SystemExit(message)

    monkeypatch.setattr(train_cub, "make_net", watched)
    monkeypatch.setattr(train_cub, "end_all", end_all)
    with pytest.raises(SystemExit, match=r"step 2 .*ranking [\d.e-]+, .*norm of the gradients (nan|inf)"):
        run(birds, tmp_path / "run", "--method", method)
    assert len(calls) == 2
