"""The CUB example as its users run it, on a tiny set of birds: training, evaluating, the demo."""

import json
import math
import re
from dataclasses import fields
from unittest.mock import Mock

import pytest
import torch
from cub_runs import TINY, rows, run, same, train_here, weights

import demo
import score
import train_cub
from apinet_head import APINet
from workbench import metrics, model_folder
from workbench.datasets import open_data
from workbench.settings import AUTO, HARMLESS, PRESETS, Settings, differences, parse


@pytest.fixture(scope="module")
def finished(birds, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "api"
    return output, run(birds, output)


@pytest.mark.parametrize("method", ["api", "baseline"])
def test_a_run_leaves_everything_and_logs_the_mean_of_an_epochs_steps(birds, tmp_path, monkeypatch, method):
    compute_loss, steps = train_cub.compute_loss, []
    monkeypatch.setattr(train_cub, "compute_loss", lambda *args: steps.append(compute_loss(*args)) or steps[-1])
    result = run(birds, tmp_path / "run", "--method", method, "--epochs", "2")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"settings.json", "log.csv", "result.json", "best", "last", "state", "tensorboard", "lock"}
    log = rows(tmp_path / "run")
    assert [(row["epoch"], row["step"]) for row in log] == [("1", "3"), ("2", "6")]
    for name in ("loss", "cross_entropy", "ranking", "train_top1"):
        assert float(log[0][name]) == pytest.approx(sum(step[name].item() for step in steps[:3]) / 3)
    assert float(log[1]["test_top1"]) == result["test_top1"]
    assert (float(log[0]["ranking"]) > 0) == (method == "api")
    assert result["images"] == 18
    assert result["errors"] == result["errors_within_families"] + result["errors_across_families"]
    assert result["errors"] == round(18 * (1 - result["test_top1"] / 100))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_both_methods_start_from_the_same_weights_and_batches(birds):
    nets, batches = [], []
    for method in ("api", "baseline"):
        settings = parse([*TINY, "--data", str(birds), "--method", method])
        train_cub.set_seed(settings.seed)
        nets.append(train_cub.make_net(settings, 6).state_dict())
        batches.append(list(train_cub.make_sampler(settings, open_data(settings))))
    assert same(*nets)
    assert batches[0] == batches[1]


def test_a_finished_run_is_not_trained_again_nor_a_folder_of_something_else(birds, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cub, "compute_loss", None)
    assert run(birds, finished[0])["test_top1"] == finished[1]["test_top1"]
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        run(birds, tmp_path)


def test_score_agrees_with_the_log(birds, finished, tmp_path, capsys):
    output, result = finished
    found = score.main([str(output / "last"), "--device", "cpu", "--json", str(tmp_path / "scores.json")])
    assert found["test_top1"] == pytest.approx(result["test_top1"])
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert "top-1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"not a model folder, it has no classes.json"):
        score.main([str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--json \S+none/scores.json cannot be written: No such file or directory$"):
        score.main([str(output / "last"), "--device", "cpu", "--json", str(tmp_path / "none" / "scores.json")])


def test_confusion_counts():
    classes = ["001.Red_Tern", "002.Blue_Tern", "003.Red_Gull"]
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 2, 0]), 3).float()
    found = metrics.confusion(logits, labels, classes, ["Tern", "Tern", "Gull"])
    assert (found["errors"], found["errors_within_families"], found["errors_across_families"]) == (3, 1, 2)
    assert found["families_by_chance"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert {"true": "001.Red_Tern", "predicted": "002.Blue_Tern", "images": 1} in found["most_confused"]
    top = metrics.scores(logits, labels)
    assert top["test_top1"] == pytest.approx(50)
    assert "1 within a family, 2 across (by chance 33 % would" in metrics.report(top | found)

    alone = metrics.confusion(logits, labels, classes, [])
    assert (alone["errors_within_families"], alone["errors_across_families"]) == (0, 3)
    assert alone["families_by_chance"] == 0
    assert "\n3 errors\n" in metrics.report(top | alone)


@pytest.mark.parametrize(
    "flags",
    [["--mutual", "sum", "--gate", "single", "--rank-weight", "0"], ["--pairs", "random"], ["--intra", "none"],
     ["--intra", "dissimilar", "--inter", "random"], ["--chunk-size", "2", "--memory", "16"],
     ["--memory", "16", "--method", "baseline"]],
)  # fmt: skip
def test_variants_of_the_method_reach_the_net(birds, tmp_path, flags):
    run(birds, tmp_path / "run", "--epochs", "1", *flags)
    head = (net := APINet.from_pretrained(tmp_path / "run" / "last")).head
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert head.gate == settings["gate"]
    assert (net.chunk_size or 0) == settings["chunk_size"]
    assert (head.intra or "none", head.inter or "none") == (settings["intra"], settings["inter"])
    assert ("mutual.fc1.weight" in head.state_dict()) == (settings["mutual"] == "mlp")
    if settings["memory"] and settings["method"] == "api":
        assert head.memory.features.shape[0] == 16
        assert head.memory.features.isfinite().all()  # filled by the 18 images of the training
    else:
        assert head.memory is None


def test_frozen_epochs_keep_the_backbone(birds, tmp_path):
    flags = ["--frozen-epochs", "1", "--epochs", "1"]
    settings = parse([*TINY, "--data", str(birds), *flags])
    train_cub.set_seed(settings.seed)
    before = train_cub.make_net(settings, 6).state_dict()
    run(birds, tmp_path / "run", *flags)
    after = weights(tmp_path / "run" / "last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("running" in name or "num_batches" in name for name in changed if name.startswith("backbone")), changed
    assert any("running_mean" in name for name in changed)
    assert "head.classifier.weight" in changed


def test_schedule_and_optimiser_are_the_published_ones(birds):
    settings = parse([*TINY, "--data", str(birds)])
    optimizer, scheduler = train_cub.make_optimizer(settings, train_cub.make_net(settings, 6), steps=9)
    assert isinstance(optimizer, torch.optim.SGD)
    for step in range(9):
        scheduler.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(settings.lr * (1 + math.cos(math.pi * step / 9)) / 2)
            assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)


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


def test_preset_follows_the_data_and_its_backbone_arguments_its_backbone():
    own = parse([])
    assert own.backbone == "resnet10t" == parse(["--data", "CUB", "--preset", "demo"]).backbone
    assert parse(["--data", "CUB"]).backbone == "resnet101"
    assert "channels" in own.backbone_args
    assert parse(["--backbone", own.backbone]) == own
    assert parse(["--backbone", "resnet18"]).backbone_args == "{}"
    given = parse(["--backbone", "resnet18", "--backbone-args", '{"output_stride": 8}'])
    assert given.backbone_args == '{"output_stride": 8}'


@pytest.mark.parametrize("flags", [[], ["--data", "folder"]])
def test_help_has_groups_and_both_presets_defaults(flags, capsys):
    with pytest.raises(SystemExit):
        parse([*flags, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{group}: --" in said for group in ("data", "model", "pairs", "loss", "optimisation", "run"))
    assert "classes in a batch (paper: 30, demo: 10)" in said
    assert "of SGD, without Nesterov (0.9)" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--device", "nowhere"], "--device nowhere is not available: torch finds "),
     (["--device", "cuda:99"], "--device cuda:99 is not available: torch finds "),
     (["--backbone", "resnet18000"], "--backbone resnet18000: timm has no such model; near: .*resnet18"),
     (["--data", "nowhere"], "nowhere is not a folder; expected CUB_200_2011"),
     (["--backbone-args", '{"no_such": 1}'], "--backbone test_resnet: .*no_such")],
)  # fmt: skip
def test_mistakes_end_with_one_line_and_leave_no_folder(birds, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=f"^{message}") as ended:
        run(birds, tmp_path / "run", *flags)
    assert "\n" not in str(ended.value)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_available_end_with_what_to_do(birds, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", Mock(side_effect=OSError("no network")))
    with pytest.raises(SystemExit, match=r"weights of test_resnet are not available(.|\n)*--no-pretrained"):
        run(birds, tmp_path / "run", "--pretrained")


def test_images_are_normalised_as_the_backbone_wants(birds, finished):
    """test_resnet's weights are for a mean and deviation of 0.5, resnet10t's for ImageNet's."""
    half = model_folder.load(finished[0] / "last").transform
    assert half == {"squash": 40, "crop": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    other = model_folder.normalization(train_cub.make_net(parse([*TINY, "--backbone", "resnet10t"]), 6))
    assert other["mean"] == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    "flags",
    [["--backbone-args", "{"], ["--method", "magic"], ["--epochs", "many"], ["--epochs", "0"], ["--n-classes", "1"],
     ["--crop", "600"], ["--lr", "nan"], ["--loader-timeout", "-1"], ["--label-smoothing", "2"],
     ["--backbone-args", "[1]"], ["--chunk-size", "most"]],
)  # fmt: skip
def test_bad_flags_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit):
        parse(flags)
    usage, _, problem = capsys.readouterr().err.rpartition("error: ")
    assert "usage" in usage
    assert flags[0] in problem


def test_differences_pass_over_what_changes_no_result():
    settings = vars(parse(["--chunk-size", "7", "--keep-chunks", "2"]))
    harmless = {"workers": 9, "output": "elsewhere", "chunk_size": AUTO, "keep_chunks": 1}
    assert differences(settings, settings | harmless, HARMLESS) == []
    assert differences(settings, settings | harmless | {"seed": 9}, HARMLESS) == ["seed: 0 there, 9 here"]


def test_demo_compares_the_methods(birds, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch)
    flags = [*TINY, "--data", str(birds), "--epochs", "1"]
    monkeypatch.setattr("sys.argv", ["demo.py", "--seeds", "1", "--runs", str(tmp_path), *flags])
    demo.main()
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    for method, title in demo.METHODS.items():
        folder = tmp_path / f"{method}-seed0"
        result = json.loads((folder / "result.json").read_text())
        assert re.search(rf"\| {title} \|.* {result['test_top1']:.1f} ", table)
        assert json.loads((folder / "settings.json").read_text())["method"] == method


def test_demo_starts_processes_and_shows_why_one_failed(birds, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(birds), "--n-classes", "7"]
    monkeypatch.setattr("sys.argv", ["demo.py", "--seeds", "1", "--jobs", "1", "--runs", str(tmp_path), *flags])
    with pytest.raises(SystemExit, match=r"--n-classes 7: CUB-200-2011 has 6 classes"):
        demo.main()
