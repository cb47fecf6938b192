"""--chunk-size auto: picked for the memory there is, noted as a number, and kept by a run that is resumed."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from cub_runs import TINY, run

import train_cub
from apinet_head import APINet
from apinet_head.step_memory import pick_chunk_size, step_memory
from workbench import chunk_size
from workbench.settings import parse

BATCH_OF_12 = ["--n-classes", "6", "--epochs", "1", "--chunk-size", "auto"]


def give(monkeypatch, memory):
    monkeypatch.setattr(chunk_size, "free_memory", lambda device: memory)


def test_the_numbers_are_noted_and_kept(birds, tmp_path, monkeypatch, capsys):
    net = train_cub.make_net(parse([*TINY, *BATCH_OF_12, "--chunk-size", "0"]), 6)
    memory = int(step_memory(net, 12, 32, chunk_size=4).total / 0.85) + 2  # in which chunks of 4 just fit
    choice = pick_chunk_size(net, 12, 32, memory=memory)
    chunks, keep = choice.chunk_size, choice.keep_chunks
    assert chunks in (2, 3, 4)
    for enough, why in ((memory, choice), (2**40, f"the number with which {tmp_path / 'run'} began")):
        give(monkeypatch, enough)
        run(birds, tmp_path / "run", *BATCH_OF_12)
        noted = json.loads((tmp_path / "run" / "settings.json").read_text())
        saved = APINet.from_pretrained(tmp_path / "run" / "last")
        assert (noted["chunk_size"], noted["keep_chunks"]) == (saved.chunk_size, saved.keep_chunks) == (chunks, keep)
        assert f"--chunk-size auto: {chunks} ({why})" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"chunk_size: {chunks} there, 6 here"):
        run(birds, tmp_path / "run", *BATCH_OF_12, "--chunk-size", "6")


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [([], 1, {}), (["--amp", "bf16"], 1, {"amp": torch.bfloat16}),
     (["--method", "baseline"], 1, {"loss": chunk_size.baseline_loss}),
     ([], 2, {"moments": 2})],  # averaging gradients takes buffers
)  # fmt: skip
def test_the_estimate_is_for_the_step_of_a_process(monkeypatch, flags, processes, expected):
    asked = []
    monkeypatch.setattr(chunk_size, "pick_chunk_size", lambda *args, **kwargs: asked.append((args, kwargs)))
    monkeypatch.setattr(chunk_size, "PartialState", lambda: SimpleNamespace(num_processes=processes))
    give(monkeypatch, 1234)
    chunk_size.estimate(parse([*TINY, *BATCH_OF_12, *flags]), lambda plain: plain)
    ((net, batch, side), arguments) = asked[0]
    assert (net.chunk_size, net.pretrained) == (0, False)
    assert (batch, side) == (12 // processes, 32)
    assert arguments == {"memory": 1234, "amp": None, "moments": 1, "loss": None} | expected


def test_memory_is_that_of_the_gpu_or_of_the_machine(monkeypatch):
    monkeypatch.setattr(chunk_size.psutil, "virtual_memory", lambda: SimpleNamespace(available=1200))
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
        run(birds, tmp_path / "run", *BATCH_OF_12)
    monkeypatch.setitem(sys.modules, "torch.distributed._tools.mem_tracker", None)
    with pytest.raises(SystemExit, match=r"--chunk-size auto: an estimate needs torch's MemTracker"):
        run(birds, tmp_path / "run", *BATCH_OF_12)
    assert not (tmp_path / "run").exists()
