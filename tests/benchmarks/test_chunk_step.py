"""The benchmark of a step in chunks: its ways are ways to one and the same step, and its table has them all."""

import chunk_step
import memory_report
import torch
from chunk_step import CACHED, WHOLE, Case
from machine import origin

CASE = Case("test_resnet", 32, 12, 4)
CPU = torch.device("cpu")


def test_all_ways_in_chunks_give_the_same_gradients():
    found = {}
    for name in [*CASE.kept(), CACHED]:
        training = chunk_step.Training(CASE, CPU)
        torch.manual_seed(1)
        training.ways()[name]()
        found[name] = [parameter.grad for parameter in training.backbone.parameters()]
        assert any(gradient.any() for gradient in found[name])
    for gradients in found.values():
        torch.testing.assert_close(gradients, found["all kept"], rtol=1e-4, atol=1e-6)


def test_on_paper_what_is_recomputed_costs_a_third():
    assert [round(CASE.on_paper(name), 2) for name in (WHOLE, *CASE.kept(), CACHED)] == [
        1, 1.33, 1.22, 1.22, 1.11, 1, 1.33,
    ]  # fmt: skip


def test_a_way_that_fails_says_why_in_its_place(monkeypatch):
    def fail(self):
        raise RuntimeError("no such way")

    monkeypatch.setattr(chunk_step.Training, "cached_step", fail)
    monkeypatch.setattr(chunk_step, "memory", lambda *_: {"memory": 2**30})
    point = chunk_step.measure(CASE, CPU, 0.1)
    text = chunk_step.make_report({"origin": origin(CPU), "points": [point], "errors": {"other": "ValueError: no"}})
    assert "## test_resnet, 12 x 32², chunks of 4, float32" in text
    assert f"| {CACHED} | RuntimeError: no such way | | 1.33 | | |" in text
    assert "| 1.33 |" in next(line for line in text.splitlines() if line.startswith("| none kept |"))
    assert "**other failed**: ValueError: no" in text


def test_table_of_chunk_sizes_for_gpus():
    fits = {"gpu": 8, "amp": "fp32", "given": 4, "chunk_size": 4, "keep_chunks": 2, "needed": 2**30, "recomputed": 0.5}
    whole = {"gpu": 8, "amp": "bf16", "given": None, "chunk_size": None, "keep_chunks": 1, "needed": 2**31}
    rows = [
        {**fits, "time": 7 / 6}, {"gpu": 8, "amp": "bf16", "given": 4},
        {"gpu": 8, "amp": "fp32", "given": None}, {**whole, "recomputed": 0.0, "time": 1.0},
    ]  # fmt: skip
    tables = [memory_report.settings_table({"choices": rows}, given).splitlines()[2] for given in (4, None)]
    assert tables == [
        "| 8 GB | 4 | 2 | 1.00 | 50% | 1.17 | does not fit |  |  |  |  |",
        "| 8 GB | does not fit |  |  |  |  | whole batch |  | 2.00 | 0% | 1.00 |",
    ]
