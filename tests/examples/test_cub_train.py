"""The CUB example as its users run it, on a tiny set of birds: its flags, and what a run leaves."""

import json
import math
import sys
from dataclasses import fields
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from cub_runs import TINY, begun, rows, run, same, weights

import score
import train_cub
from apinet_head import APINet
from apinet_head.step_memory import ChunkChoice
from workbench import chunk_size, metrics, model_folder
from workbench.datasets import open_data
from workbench.settings import PRESETS, Settings, parse


@pytest.mark.parametrize(
    ("method", "backbone", "mean", "std"),
    [("api", "test_resnet", [0.5] * 3, [0.5] * 3),
     ("baseline", "resnet10t", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])],
)  # fmt: skip
def test_a_run_leaves_everything_and_is_not_trained_again(birds, tmp_path, monkeypatch, method, backbone, mean, std):
    """In the log are the means of an epoch's steps; images are normalised as for the backbone's weights."""
    compute_loss, steps = train_cub.compute_loss, []
    monkeypatch.setattr(train_cub, "compute_loss", lambda *args: steps.append(compute_loss(*args)) or steps[-1])
    flags = ["--method", method, "--backbone", backbone, "--epochs", "2"]
    result = run(birds, tmp_path / "run", *flags)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"settings.json", "log.csv", "result.json", "best", "last", "state", "tensorboard", "lock"}
    log = rows(tmp_path / "run")
    assert [(row["epoch"], row["step"]) for row in log] == [("1", "3"), ("2", "6")]
    for name in ("loss", "cross_entropy", "ranking", "train_top1"):
        assert float(log[0][name]) == pytest.approx(sum(step[name].item() for step in steps[:3]) / 3)
    assert float(log[1]["test_top1"]) == result["test_top1"]
    assert (float(log[0]["ranking"]) > 0) == (method == "api")
    assert result["images"] == 18
    assert result["errors"] == round(18 * (1 - result["test_top1"] / 100))
    last = tmp_path / "run" / "last"
    assert model_folder.load(last).transform == {"squash": 40, "crop": 32, "mean": mean, "std": std}

    monkeypatch.setattr(train_cub, "compute_loss", None)
    assert run(birds, tmp_path / "run", *flags)["test_top1"] == result["test_top1"]
    with pytest.raises(SystemExit, match=r"--json \S+none/scores.json cannot be written: No such file or directory$"):
        score.main([str(last), "--device", "cpu", "--json", str(tmp_path / "none" / "scores.json")])


def test_both_methods_start_from_the_same_weights_and_batches(birds):
    (one, net), (other, baseline) = (begun(birds, "--method", method) for method in ("api", "baseline"))
    assert same(net.state_dict(), baseline.state_dict())
    assert list(train_cub.make_sampler(one, open_data(one))) == list(train_cub.make_sampler(other, open_data(other)))


def test_confusion_counts():
    classes = ["001.Red_Tern", "002.Blue_Tern", "003.Red_Gull"]
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 1, 2, 0]), 3).float()
    found = metrics.confusion(logits, labels, classes, ["Tern", "Tern", "Gull"])
    figures = ("errors", "errors_within_families", "errors_across_families", "families_by_chance")
    assert [found[name] for name in figures] == pytest.approx([3, 1, 2, (0.5 + 0.5 + 0) / 3])
    assert {"true": "001.Red_Tern", "predicted": "002.Blue_Tern", "images": 1} in found["most_confused"]
    top = metrics.scores(logits, labels)
    assert "1 within a family, 2 across (by chance 33 % would" in metrics.report(top | found)

    alone = metrics.confusion(logits, labels, classes, [])
    assert [alone[name] for name in figures] == [3, 0, 3, 0]
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
    row, weight = rows(tmp_path / "run")[0], settings["rank_weight"]
    assert float(row["loss"]) == pytest.approx(float(row["cross_entropy"]) + weight * float(row["ranking"]))
    assert (head.memory is not None) == (settings["memory"] > 0 and settings["method"] == "api")
    if head.memory is not None:
        assert head.memory.features.shape[0] == 16
        assert head.memory.features.isfinite().all()  # filled by the 18 images of the training


def test_frozen_epochs_keep_the_backbone(birds, tmp_path):
    flags = ["--frozen-epochs", "1", "--epochs", "1"]
    before = begun(birds, *flags)[1].state_dict()
    run(birds, tmp_path / "run", *flags)
    after = weights(tmp_path / "run" / "last")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("running" in name or "num_batches" in name for name in changed if name.startswith("backbone")), changed
    assert any("running_mean" in name for name in changed)
    assert "head.classifier.weight" in changed


def test_schedule_and_optimiser_are_the_published_ones(birds):
    settings, net = begun(birds)
    optimizer, scheduler = train_cub.make_optimizer(settings, net, steps=9)
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


def test_help_has_both_presets_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "classes in a batch (paper: 30, demo: 10)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--device", "nowhere"], "--device nowhere is not available: torch finds "),
     (["--backbone", "resnet18000"], "--backbone resnet18000: timm has no such model; near: .*resnet18"),
     (["--n-classes", "7"], "--n-classes 7: CUB-200-2011 has 6 classes"),
     (["--data", "nowhere"], "nowhere is not a folder; expected CUB_200_2011"),
     (["--backbone-args", '{"no_such": 1}'], "--backbone test_resnet: .*no_such"),
     (["--pretrained"], "the pretrained weights of test_resnet are not available: no network\n.*--no-pretrained"),
     (["--chunk-size", "auto"], "--chunk-size auto: an estimate needs torch's MemTracker")],
)  # fmt: skip
def test_mistakes_end_with_a_line_and_leave_no_folder(birds, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("timm.models._hub.hf_hub_download", Mock(side_effect=OSError("no network")))
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    with pytest.raises(SystemExit, match=rf"^{message}.*\Z"):
        run(birds, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


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


BATCH_OF_12 = ["--n-classes", "6", "--epochs", "1", "--chunk-size", "auto"]


def test_a_chunk_size_for_the_memory_there_is_is_picked_once_noted_and_kept(birds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chunk_size, "free_memory", lambda device: 2**20)
    with pytest.raises(SystemExit, match="--chunk-size auto: no chunk size brings a batch of 12 into"):
        run(birds, tmp_path / "run", *BATCH_OF_12)
    choice = ChunkChoice(4, 2, 12, {(4, 2): 2**30}, 2**30, 2**30)
    monkeypatch.setattr(chunk_size, "pick_chunk_size", Mock(side_effect=[choice]))
    for why in (choice, f"the number with which {tmp_path / 'run'} began"):
        run(birds, tmp_path / "run", *BATCH_OF_12)
        noted = json.loads((tmp_path / "run" / "settings.json").read_text())
        saved = APINet.from_pretrained(tmp_path / "run" / "last")
        assert (noted["chunk_size"], noted["keep_chunks"]) == (saved.chunk_size, saved.keep_chunks) == (4, 2)
        assert f"--chunk-size auto: 4 ({why})" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="chunk_size: 4 there, 6 here"):
        run(birds, tmp_path / "run", *BATCH_OF_12, "--chunk-size", "6")


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [([], 1, {}), (["--amp", "bf16"], 1, {"amp": torch.bfloat16}),
     (["--method", "baseline"], 1, {"loss": chunk_size.baseline_loss}),
     ([], 2, {"moments": 2})],  # averaging gradients takes buffers
)  # fmt: skip
def test_the_estimate_is_for_the_step_of_a_process(monkeypatch, flags, processes, expected):
    monkeypatch.setattr(chunk_size, "pick_chunk_size", pick := Mock())
    monkeypatch.setattr(chunk_size, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    monkeypatch.setattr(chunk_size, "free_memory", lambda device: 1234)
    chunk_size.estimate(
        parse([*TINY, *BATCH_OF_12, "--pretrained", *flags]), lambda plain: (plain.chunk_size, plain.pretrained)
    )
    arguments = {"memory": 1234, "amp": None, "moments": 1, "loss": None} | expected
    pick.assert_called_once_with((0, False), 12 // processes, 32, **arguments)


def test_memory_is_that_of_the_gpu_or_of_the_machine(monkeypatch):
    monkeypatch.setattr(chunk_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=1200))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 + device, 1000))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chunk_size.free_memory(device) for device in ("auto", "cuda", "cpu")] == [701, 701, 600]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chunk_size.free_memory("auto") == 600
