"""The CUB example as its users run it, on a tiny set of birds: training, resuming, evaluating, the demo."""

import csv
import json
from dataclasses import fields, replace

import pytest
import torch
from cub_runs import TINY, run, same, weights

import demo
import score as evaluate
import train_cub as train
from apinet_head import APINet
from workbench.datasets.birds_cache import open_data
from workbench.run_folder import RunFolder
from workbench.settings import PRESETS, Settings, differences, parse, run_folder


@pytest.fixture(scope="session")
def finished(birds, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "api"
    return output, run(birds, output)


@pytest.mark.parametrize("method", ["api", "baseline"])
def test_a_run_leaves_everything(birds, tmp_path, method):
    result = run(birds, tmp_path / "run", "--method", method, "--epochs", "2")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "settings.json", "data.json", "log.csv", "curves.png", "result.json", "best", "last", "state", "tensorboard",
    }  # fmt: skip
    with (tmp_path / "run" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["step"] for row in rows] == ["3", "6"]
    assert float(rows[1]["test_top1"]) == result["test_top1"]
    assert (float(rows[0]["ranking"]) > 0) == (method == "api")
    assert result["images"] == 18
    assert result["errors"] == result["errors_within_families"] + result["errors_across_families"]
    assert result["errors"] == round(18 * (1 - result["test_top1"] / 100))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_both_methods_start_from_the_same_weights_and_batches(birds, tmp_path):
    data = open_data(parse([*TINY, "--data", str(birds)]))
    trainers = [
        train.Trainer(settings := parse([*TINY, "--data", str(birds), "--method", method]), data,
                      RunFolder(tmp_path / method, settings))
        for method in ("api", "baseline")
    ]  # fmt: skip
    assert same(*(trainer.net.state_dict() for trainer in trainers))
    assert list(trainers[0].sampler) == list(trainers[1].sampler)


def test_resumed_run_ends_as_the_run_never_interrupted(birds, finished, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    train_epoch = train.Trainer.train_epoch

    def killed_in_the_third(self, progress, sums):
        row = train_epoch(self, progress, sums)
        if progress.epoch == 2:
            raise KilledError
        return row

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_epoch", killed_in_the_third)
        with pytest.raises(KilledError):
            run(birds, tmp_path / "run")
    torch.manual_seed(123)  # nothing may depend on the random state that the new process happens to have
    resumed = run(birds, tmp_path / "run")
    output, result = finished
    assert same(weights(tmp_path / "run" / "last"), weights(output / "last"))
    timing = {"seconds"}
    assert {k: v for k, v in resumed.items() if k not in timing} == {k: v for k, v in result.items() if k not in timing}


def test_finished_run_is_not_trained_again(birds, finished, monkeypatch):
    output, result = finished
    monkeypatch.setattr(train.Trainer, "train_epoch", None)
    assert run(birds, output)["test_top1"] == result["test_top1"]


def test_folder_of_another_run_is_refused_with_the_differences(birds, finished, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)lr: 0.05 there, 0.5 here.*another --output"):
        run(birds, finished[0], "--lr", "0.5")
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        run(birds, tmp_path)


def test_evaluate_agrees_with_the_log(birds, finished, tmp_path, capsys):
    output, result = finished
    found = evaluate.main([str(output / "last"), "--device", "cpu", "--json", str(tmp_path / "scores.json")])
    assert found["test_top1"] == pytest.approx(result["test_top1"])
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert "top-1" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"run.json"):
        evaluate.main([str(tmp_path)])


def test_confusion_counts():
    classes = ["001.Red_Tern", "002.Blue_Tern", "003.Red_Gull"]
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 2, 0]), 3).float()
    found = evaluate.confusion(logits, labels, classes, ["Tern", "Tern", "Gull"])
    assert (found["errors"], found["errors_within_families"], found["errors_across_families"]) == (3, 1, 2)
    assert found["families_by_chance"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert {"true": "001.Red_Tern", "predicted": "002.Blue_Tern", "images": 1} in found["most_confused"]
    scores = evaluate.scores(logits, labels)
    assert scores["test_top1"] == pytest.approx(50)
    assert "1 within a family, 2 across (by chance 33 % would" in evaluate.report(scores | found)

    alone = evaluate.confusion(logits, labels, classes, [])
    assert (alone["errors_within_families"], alone["errors_across_families"]) == (0, 3)
    assert alone["families_by_chance"] == 0
    assert "\n3 errors\n" in evaluate.report(scores | alone)


@pytest.mark.parametrize(
    "flags",
    [["--mutual", "sum", "--gate", "single", "--rank-weight", "0"], ["--pairs", "random"], ["--intra", "none"],
     ["--intra", "dissimilar", "--inter", "random"], ["--chunk-size", "2"]],
)  # fmt: skip
def test_variants_of_the_method_reach_the_net(birds, tmp_path, flags):
    run(birds, tmp_path / "run", "--epochs", "1", *flags)
    net = APINet.from_pretrained(tmp_path / "run" / "last")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert net.head.gate == settings["gate"]
    assert (net.chunk_size or 0) == settings["chunk_size"]
    assert (net.head.intra or "none", net.head.inter or "none") == (settings["intra"], settings["inter"])
    assert ("mutual.fc1.weight" in net.head.state_dict()) == (settings["mutual"] == "mlp")


def test_frozen_epochs_keep_the_backbone(birds, tmp_path):
    flags = ["--frozen-epochs", "1", "--epochs", "1"]
    settings = parse([*TINY, "--data", str(birds), *flags])
    train.set_seed(settings.seed)
    before = train.make_net(settings, 6).state_dict()
    run(birds, tmp_path / "run", *flags)
    after = weights(tmp_path / "run" / "last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("running" in name or "num_batches" in name for name in changed if name.startswith("backbone")), changed
    assert any("running_mean" in name for name in changed)
    assert "head.classifier.weight" in changed


def test_schedule_and_optimiser_are_the_published_ones(birds, tmp_path):
    settings = parse([*TINY, "--data", str(birds)])
    trainer = train.Trainer(settings, open_data(settings), RunFolder(tmp_path / "run", settings))
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    weight = torch.nn.Parameter(torch.zeros(1))
    reference = torch.optim.SGD([weight], settings.lr, momentum=0.9)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=9)
    for step in range(9):
        trainer.scheduler.step_update(step)
        for group in trainer.optimizer.param_groups:
            assert group["lr"] == pytest.approx(reference.param_groups[0]["lr"])
            assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
        reference.step()
        cosine.step()


def test_paper_preset():
    settings = parse(["--preset", "paper"])
    expected = {
        "resize": 512, "crop": 448, "backbone": "resnet101", "pretrained": True, "n_classes": 30, "n_samples": 4,
        "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 100, "frozen_epochs": 8, "margin": 0.05,
        "rank_weight": 1.0, "dropout": 0.5, "hidden_dim": 512, "frozen_batch_norm": "train", "method": "api",
    }  # fmt: skip
    assert {name: getattr(settings, name) for name in expected} == expected


def test_every_setting_is_a_flag_and_presets_name_settings():
    names = {item.name for item in fields(Settings)}
    assert all(preset.keys() <= names for preset in PRESETS.values())
    for item in fields(Settings):
        flag = f"--{item.name.replace('_', '-')}"
        if isinstance(item.default, bool):
            assert getattr(parse([flag]), item.name) is True
        else:
            value = (item.metadata["choices"] or [item.default])[-1]
            assert getattr(parse(["--data", "folder", flag, str(value)]), item.name) == value


def test_preset_follows_the_data_unless_given():
    assert parse([]).backbone == "resnet10t"
    assert parse(["--data", "CUB"]).backbone == "resnet101"
    assert parse(["--data", "CUB", "--preset", "demo"]).backbone == "resnet10t"
    assert str(run_folder(parse(["--data", "some/CUB"]))) == "runs/CUB-api-resnet101-seed0"


@pytest.mark.parametrize("flags", [["--backbone-args", "{"], ["--method", "magic"], ["--epochs", "many"]])
def test_bad_flags_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    assert "usage" in capsys.readouterr().err


def test_differences_pass_over_what_changes_no_result():
    settings = parse([])
    assert differences(vars(settings), replace(settings, workers=9, output="elsewhere")) == []
    assert differences(vars(settings), replace(settings, seed=9)) == ["seed: 0 there, 9 here"]
    older = {name: value for name, value in vars(settings).items() if name != "dataset"}
    assert differences(older, settings) == []
    assert differences(older, replace(settings, dataset="cars")) == ["dataset: 'cub' there, 'cars' here"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that this says is missing")
def test_missing_device_is_named(birds, tmp_path):
    with pytest.raises(SystemExit, match="--device cuda is not to be had here: torch finds cpu"):
        run(birds, tmp_path / "run", "--device", "cuda")


def test_embedded_birds_are_drawn_once_into_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = parse(["--species", "3", "--images-per-species", "4", "--image-size", "32"])
    data = open_data(settings)
    assert (len(data.classes), len(data.train), len(data.test)) == (3, 6, 6)
    assert str(tmp_path) in capsys.readouterr().out
    open_data(settings)
    assert capsys.readouterr().out == ""


def test_demo_compares_the_methods(birds, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--data", str(birds), "--epochs", "1"]
    monkeypatch.setattr("sys.argv", ["demo.py", "--seeds", "1", "--output", str(tmp_path), *flags])
    demo.main()
    table = (tmp_path / "table.md").read_text()
    assert "| Baseline |" in table
    assert "| API-Net |" in table
    assert table.strip() in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    result = json.loads((tmp_path / "api-seed0" / "result.json").read_text())
    assert f"{result['test_top1']:.1f}" in table


def test_demo_shows_why_a_run_failed(birds, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(birds), "--n-classes", "7"]
    monkeypatch.setattr("sys.argv", ["demo.py", "--seeds", "1", "--output", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match=r"n_classes=7 .*labels have 6"):
        demo.main()
