"""--chunk-size auto: picked for the memory there is, noted as a number, and kept by a run that goes on."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_cub
from apinet_head import APINet
from apinet_head.step_memory import step_memory
from workbench import chunk_size
from workbench.settings import AUTO, Settings, differences, parse

TINY = [
    "--preset", "demo", "--backbone", "test_resnet", "--backbone-args", "{}", "--resize", "40", "--crop", "32",
    "--n-classes", "6", "--n-samples", "2", "--epochs", "1", "--device", "cpu", "--chunk-size", "auto",
]  # fmt: skip


def run(birds, output, *flags):
    return train_cub.main([*TINY, "--data", str(birds), "--output", str(output), *flags])


def needed(settings, size, batch=12, **arguments):
    """Memory in which chunks of `size` just fit, with the margin."""
    net = train_cub.make_net(replace(settings, chunk_size=0), 6)
    return int(step_memory(net, batch, settings.crop, chunk_size=size, **arguments).total / 0.85) + 2


def give(monkeypatch, memory):
    monkeypatch.setattr(chunk_size, "free_memory", lambda device: memory)


def noted(output):
    return json.loads((output / "settings.json").read_text())["chunk_size"]


def test_the_number_is_noted_and_kept(birds, tmp_path, monkeypatch, capsys):
    settings = parse([*TINY[:-2], "--data", str(birds)])
    give(monkeypatch, needed(settings, 4))
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == 4
    assert APINet.from_pretrained(tmp_path / "run" / "last").chunk_size == 4
    assert json.loads((tmp_path / "run" / "last" / "run.json").read_text())["settings"]["chunk_size"] == 4
    assert "--chunk-size auto: 4 (3 chunks of 4 for a batch of 12: " in capsys.readouterr().out

    give(monkeypatch, 2**40)
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == 4
    assert f"--chunk-size auto: 4 (the number with which {tmp_path / 'run'} began)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="chunk_size: 4 there, 6 here"):
        run(birds, tmp_path / "run", "--chunk-size", "6")


def test_a_run_begun_with_a_number_goes_on_with_it(birds, tmp_path):
    run(birds, tmp_path / "run", "--chunk-size", "3")
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == 3


def test_the_whole_batch_is_zero(birds, tmp_path, monkeypatch, capsys):
    give(monkeypatch, 2**40)
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == 0
    assert "--chunk-size auto: 0 (the whole batch for a batch of 12: " in capsys.readouterr().out


def auto(settings, folder):
    return chunk_size.with_chunk_size(settings, folder, lambda plain: train_cub.make_net(plain, 6)).chunk_size


def test_each_process_has_its_share_and_the_buffers_of_averaging(tmp_path, monkeypatch, capsys):
    settings = parse([*TINY, "--crop", "96", "--resize", "96"])
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr(chunk_size, "PartialState", lambda: two)
    give(monkeypatch, needed(settings, 3, batch=6, moments=2))
    assert auto(settings, tmp_path) == 3
    assert "for a batch of 6" in capsys.readouterr().out
    give(monkeypatch, needed(settings, 3, batch=6, moments=1))
    assert auto(settings, tmp_path) == 2


def test_the_baseline_has_its_own_loss(tmp_path, monkeypatch):
    settings = parse([*TINY, "--method", "baseline"])
    give(monkeypatch, needed(settings, 4, loss=chunk_size.cross_entropy))
    assert auto(settings, tmp_path) == 4


def test_mixed_precision_counts(tmp_path, monkeypatch):
    settings = parse([*TINY, "--crop", "96", "--resize", "96", "--amp", "bf16"])
    give(monkeypatch, needed(settings, 6, amp=torch.bfloat16))
    assert auto(settings, tmp_path) == 6
    assert auto(replace(settings, amp="no"), tmp_path) < 6


def test_memory_is_that_of_the_gpu_or_of_the_machine(monkeypatch):
    monkeypatch.setattr(chunk_size.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1200}))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700 + device, 1000))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [chunk_size.free_memory(device) for device in ("auto", "cuda", "cpu")] == [701, 701, 600]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chunk_size.free_memory("auto") == 600


def test_what_cannot_be_told_ends_the_command(birds, tmp_path, monkeypatch):
    give(monkeypatch, 2**20)
    with pytest.raises(SystemExit, match="--chunk-size auto: no chunk size brings a batch of 12 into"):
        run(birds, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    with pytest.raises(SystemExit, match=r"--chunk-size auto: an estimate needs torch's MemTracker"):
        run(birds, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_numbers_and_auto_are_chunk_sizes(capsys):
    assert parse(["--chunk-size", "7"]).chunk_size == 7
    assert parse([]).chunk_size == 0
    with pytest.raises(SystemExit):
        parse(["--chunk-size", "most"])
    assert "--chunk-size: invalid" in capsys.readouterr().err


def test_auto_differs_from_no_number():
    begun = vars(parse(["--chunk-size", "7"]))
    assert differences(begun, parse(["--chunk-size", AUTO])) == []
    assert differences(begun, parse(["--chunk-size", AUTO, "--seed", "9"])) == ["seed: 0 there, 9 here"]
    assert differences(begun, Settings(**begun | {"chunk_size": 8})) == ["chunk_size: 7 there, 8 here"]
