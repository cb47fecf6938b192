"""--chunk-size auto: picked for the memory there is, noted as a number, and kept by a run that is resumed."""

import json
import sys
from types import SimpleNamespace

import cub_runs
import pytest
import torch
from cub_runs import TINY

import train_cub
from apinet_head import APINet
from apinet_head.step_memory import pick_chunk_size, step_memory
from workbench import chunk_size
from workbench.settings import AUTO, HARMLESS, differences, parse

BATCH_OF_12 = ["--n-classes", "6", "--epochs", "1"]


def run(birds, output, *flags):
    return cub_runs.run(birds, output, *BATCH_OF_12, "--chunk-size", "auto", *flags)


def give(monkeypatch, memory):
    monkeypatch.setattr(chunk_size, "free_memory", lambda device: memory)


def noted(output):
    settings = json.loads((output / "settings.json").read_text())
    return settings["chunk_size"], settings["keep_chunks"]


def test_the_numbers_are_noted_and_kept(birds, tmp_path, monkeypatch, capsys):
    settings = parse([*TINY, *BATCH_OF_12, "--data", str(birds)])
    net = train_cub.make_net(settings, 6)
    memory = int(step_memory(net, 12, 32, chunk_size=4).total / 0.85) + 2  # in which chunks of 4 just fit
    choice = pick_chunk_size(net, 12, 32, memory=memory)
    assert choice.chunk_size in (2, 3, 4)
    give(monkeypatch, memory)
    run(birds, tmp_path / "run")
    numbers = choice.chunk_size, choice.keep_chunks
    assert noted(tmp_path / "run") == numbers
    saved = APINet.from_pretrained(tmp_path / "run" / "last")
    assert (saved.chunk_size, saved.keep_chunks) == numbers
    assert f"--chunk-size auto: {numbers[0]} ({choice})" in capsys.readouterr().out

    give(monkeypatch, 2**40)
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == numbers
    began = f"--chunk-size auto: {numbers[0]} (the number with which {tmp_path / 'run'} began)"
    assert began in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"chunk_size: {numbers[0]} there, 6 here"):
        run(birds, tmp_path / "run", "--chunk-size", "6")


def test_a_run_begun_with_a_number_goes_on_with_it(birds, tmp_path):
    run(birds, tmp_path / "run", "--chunk-size", "3", "--keep-chunks", "2")
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run") == (3, 2)


def test_the_whole_batch_is_zero(birds, tmp_path, monkeypatch, capsys):
    give(monkeypatch, 2**40)
    run(birds, tmp_path / "run")
    assert noted(tmp_path / "run")[0] == 0
    assert "--chunk-size auto: 0 (the whole batch for a batch of 12: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        ([], 1, {"amp": None, "moments": 1, "loss": None}),
        (["--amp", "bf16"], 1, {"amp": torch.bfloat16, "moments": 1, "loss": None}),
        (["--method", "baseline"], 1, {"amp": None, "moments": 1, "loss": chunk_size.baseline_loss}),
        ([], 2, {"amp": None, "moments": 2, "loss": None}),  # averaging gradients takes buffers
    ],
)
def test_the_estimate_is_for_the_step_of_a_process(monkeypatch, flags, processes, expected):
    asked = []
    monkeypatch.setattr(chunk_size, "pick_chunk_size", lambda *args, **kwargs: asked.append((args, kwargs)))
    monkeypatch.setattr(chunk_size, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    give(monkeypatch, 1234)
    settings = parse([*TINY, *BATCH_OF_12, "--memory", "16", *flags])
    chunk_size.estimate(settings, lambda plain: plain)
    ((net, batch, side), arguments) = asked[0]
    assert (net.chunk_size, net.pretrained, net.memory) == (0, False, 16)
    assert (batch, side) == (12 // processes, 32)
    assert arguments == {"memory": 1234, **expected}


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


def test_auto_differs_from_no_number():
    begun = vars(parse(["--chunk-size", "7", "--keep-chunks", "2"]))
    assert differences(begun, vars(parse(["--chunk-size", AUTO])), HARMLESS) == []
    assert differences(begun, vars(parse(["--chunk-size", AUTO, "--seed", "9"])), HARMLESS) == ["seed: 0 there, 9 here"]
    assert differences(begun, begun | {"chunk_size": 8}, HARMLESS) == ["chunk_size: 7 there, 8 here"]
