"""The benchmarks: that all sides do the same work, and that figures get into the documents as they were measured."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import footprint
import head
import miners
import mining
import pytest
import report
import step_memory
import torch
import train_step
from harness import Part, Turns, measure, take_turns, write_json
from mining import Budget, Case
from report import blocks, fill, load, newest, section, spread

from apinet_head import APINet, ChunkedBackbone, mine_pairs
from apinet_head.mining import BACKENDS
from apinet_head.step_memory import step_memory as estimate_memory

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
ON_CUDA_ONLY = {"ours, triton", report.GRAPH}


@pytest.mark.parametrize("case", [Case(20, 7), Case(120, 33), Case(20, 7, keys=44)])
def test_all_sides_find_the_nearest(case):
    batch = mining.make_batch(case, CPU)
    assert batch.labels.bincount().tolist() == [4] * (case.size // 4)
    keys = {"keys": batch.keys.double(), "key_labels": batch.key_labels} if batch.has_keys else {}
    right = mine_pairs(batch.features.double(), batch.labels, **keys).partner.view(2, -1)
    rows = torch.tensor([3, case.size - 1, 0])
    assert torch.equal(mining.right_partners(batch, rows), right[:, rows])
    found = miners.sides(CPU)
    assert {report.LIMIT, report.AUTO, "ours, dense", "ours, tiled", report.PUBLISHED, "dense torch"} <= set(found)
    for name, side in found.items():
        has_partners = name not in ON_CUDA_ONLY | {report.LIMIT} and "triton" not in name  # other tests add backends
        if has_partners and not (name == report.PUBLISHED and case.keys):
            partner = side(batch)()
            assert torch.equal(partner.view(2, case.size), right), name
            assert mining.agreement({name: partner}, batch) == {name: 1.0}
            assert mining.agreement({name: 0 * partner}, batch)[name] < 0.2


def test_sides_of_the_head_compute_the_same(monkeypatch):
    head.check_same(CPU)
    monkeypatch.setattr(head, "api_loss", partial(head.api_loss, margin=0.06))
    with pytest.raises(AssertionError):
        head.check_same(CPU)


def test_steps_of_all_sides_train_the_backbone():
    backbone = torch.nn.Linear(6, 8)
    images, labels = torch.randn(16, 6), torch.arange(16) // 4
    for name, one in train_step.make_losses(8, CPU).items():
        before = backbone.weight.detach().clone()
        step = train_step.Step(ChunkedBackbone(backbone, 4), *one)
        step(images, labels)
        assert not torch.equal(before, backbone.weight), name
        step.backward(images, labels)
        assert all(p.grad is not None for p in one[0].parameters()), name


def test_all_ways_in_chunks_give_the_same_gradients():
    case, batch = train_step.Case("test_resnet", 32, 12, "float32", 4), train_step.make_batch(12, 32, CPU)
    found = []
    for way in (*step_memory.kept(case), step_memory.CACHED):
        step = step_memory.make_step(way, case, CPU)
        step.head.eval()  # no dropout: its random numbers differ
        step.backward(*batch)
        found.append([parameter.grad for parameter in (*step.run.parameters(), *step.head.parameters())])
        assert any(gradient.any() for gradient in found[-1])
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-4, atol=1e-6)


def test_a_failing_side_leaves_the_others_their_turns_and_a_line_of_why():
    calls = []
    reasons = {
        ValueError("no such device\nand more"): "not available: no such device", TypeError("x\ny"): "TypeError: x",
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."): "out of memory",
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."): "out of memory", MemoryError(): "out of memory",
    }  # fmt: skip
    failing = {repr(error): Mock(side_effect=error) for error in reasons}
    turns = take_turns({"a": lambda: calls.append("a"), **failing, "c": lambda: calls.append("c")}, 0.0, 60)
    assert [sorted(calls[place : place + 2]) for place in range(0, len(calls), 2)] == 4 * [["a", "c"]]  # one warms up
    assert {name: len(values) for name, values in turns.seconds.items()} == {"a": 3, "c": 3}
    assert turns.absent == {repr(error): why for error, why in reasons.items()}
    alone = take_turns({"a": lambda: time.sleep(0.02)}, 10, alone=0.01)
    assert len(alone.seconds["a"]) == 1, "a long first round is the only one"


def test_ratios_are_of_the_same_round():
    turns = Turns({"a": [1.0, 20.0, 30.0], "b": [10.0, 2.0, 60.0]}, {"c": "out of memory"}, {})
    found = turns.summary("b")
    assert found["a"]["ratio"] == {"low": 0.3, "median": 0.5, "high": 5.25}
    assert found["a"]["seconds"] == {"low": 10.5, "median": 20.0, "high": 25.0}
    assert found["c"] == {"absent": "out of memory"}
    assert spread([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_small_batches_come_first_and_what_would_take_too_much_is_left_out(monkeypatch):
    in_order = mining.cases(torch.device("cuda"))
    assert [case.products for case in in_order] == sorted(case.products for case in in_order)
    assert [case.dtype for case in in_order[: 2 * len(mining.DIMS)]] == [*3 * ["float32"], *3 * ["bfloat16"]]
    monkeypatch.setattr(mining, "free_memory", lambda: 10 * 2**30)
    plan, small, large, huge = Budget(seconds=100, cases=10), Case(1000, 8), Case(4000, 8), Case(20_000, 8)
    times = {"slow": 0.3, "quick": 0.01, "next": 0.1}
    assert plan.refuse(times, large, CPU) == {}  # nothing is known yet
    plan.times = {(name, "float32", 8): (small.products, took) for name, took in times.items()}
    # 16 times the products: five calls of 4.8 s are over 10 s, of 1.6 s not, nor are two calls of a single round.
    assert plan.refuse(times, large, CPU) == {"slow": "skipped: would take over a tenth of the time"}
    plan.share = 1.0
    assert plan.refuse(times, large, CPU) == {}
    plan.end = time.perf_counter() + 2
    assert plan.refuse(times, large, CPU) == dict.fromkeys(["slow", "next"], "skipped: would take more time")
    assert set(plan.refuse(times, huge, CPU).values()) == {"skipped: might take more memory than is free"}
    # A GPU says so itself; but the published way needs the host.
    late = Budget(seconds=1, cases=1)
    assert list(late.refuse([*times, report.PUBLISHED], huge, torch.device("cuda"))) == [report.PUBLISHED]


def allocate(mebibytes):
    # More than is measured then: that is not to count, nor to hide what is.
    torch.empty(60 * 2**20 // 4).zero_()
    return footprint.growth_of_process(lambda: torch.empty(mebibytes * 2**20 // 4).zero_())


@pytest.mark.skipif(not footprint.CAN_MEASURE_GROWTH, reason="needs Linux")
def test_memory_of_fresh_processes():
    # Linux counts pages for each core apart, and sums up when enough have come together.
    cores = os.cpu_count()
    slack = 1 + cores * max(32, 2 * cores) * 4096 / 2**20
    fresh = partial(footprint.in_fresh_process, seconds=60)
    for expected in (5, 40):
        grown, failure = fresh(allocate, expected)
        assert failure is None
        assert abs(grown / 2**20 - expected) < slack
    assert fresh(signal.raise_signal, signal.SIGKILL) == (None, "out of memory")
    assert fresh(signal.raise_signal, signal.SIGABRT) == (None, "its process ended with -6")
    assert fresh(allocate, -4)[1].startswith("RuntimeError")
    assert fresh(time.sleep, 60, seconds=0.1) == (None, "took more than 0 s")


def tiny_plan():
    batches = [Case(size, dim) for size in (8, 16) for dim in (2048, 4)]
    return {
        "mining": Part(lambda *_: batches, lambda device, *_: partial(mining.measure, device, Budget(600, 3000)), 1),
        "head": head.PART._replace(cases=lambda *_: [head.Case(5, mined, batch=8, dim=8) for mined in (False, True)]),
        "train_step": train_step.PART._replace(cases=lambda *_: [train_step.Case("test_resnet", 32, 8)]),
    }


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        for name in set(BACKENDS) - {"dense", "tiled", "triton"}:
            patch.delitem(BACKENDS, name)  # of other tests' making: a fresh process doesn't know them
        return measure(tiny_plan(), CPU, quick=True, seconds=0.1)


def check_measured(found):
    assert found["errors"] == {}
    assert [(point["size"], point["dim"]) for point in found["mining"]] == [(8, 2048), (8, 4), (16, 2048), (16, 4)]
    for point in found["mining"] + found["head"] + found["train_step"]:
        for name, side in point["sides"].items():
            if "absent" in side:
                assert name in ON_CUDA_ONLY, side
            else:
                assert 0 < side["seconds"]["low"] <= side["seconds"]["median"] <= side["seconds"]["high"]
                assert side["ratio"]["median"] > 0
    first = found["mining"][0]["sides"]
    assert {report.LIMIT, report.AUTO, "ours, dense", report.PUBLISHED, "pytorch-metric-learning"} <= set(first)
    assert all(side["agreement"] == 1 for name, side in first.items() if name != report.LIMIT and "absent" not in side)
    assert set(found["origin"]) >= {"device", "cores", "threads", "date", "python", "versions"}
    assert found["head"][0]["sides"]["ours"]["saved"] < found["head"][0]["sides"]["published"]["saved"]


def test_all_parts_measure(measured):
    check_measured(measured)
    if footprint.CAN_MEASURE_GROWTH:
        assert "memory" in measured["mining"][0]["sides"]["torch.cdist"]


@pytest.mark.gpu
def test_all_parts_measure_on_a_gpu():
    found = measure(tiny_plan(), torch.device("cuda"), quick=True, seconds=0.1)
    check_measured(found)
    sides = found["mining"][0]["sides"]
    assert sides[report.PUBLISHED]["syncs"] >= 2
    assert all(side["syncs"] == 0 for name, side in sides.items() if name.startswith("ours"))
    assert set(found["origin"]) >= {"driver", "capability"}


def test_a_case_that_fails_leaves_the_others():
    def fail_at_two(case, device, seconds):
        return {"sides": {"a": {"seconds": 1 / (case - 2)}}}

    part = Part(lambda *_: [1, 2, 3], lambda *_: partial(fail_at_two, device=1, seconds=1), seconds=1.0)
    found = measure({"a": part}, CPU, only="a")
    assert found["errors"] == {"a, 2": "ZeroDivisionError: division by zero"}
    assert len(found["a"]) == 2
    assert measure({"a": part}, CPU, only="a, 2")["a"] == []


def test_ways_of_a_step_are_measured_beside_their_estimates(monkeypatch):
    monkeypatch.setattr(footprint, "CAN_MEASURE_GROWTH", False)
    point = step_memory.measure(train_step.Case("test_resnet", 32, 8, "float32", 4), CPU, seconds=0.01)
    sides = point["sides"]
    assert set(sides) == {
        "the whole batch at once", "gradient checkpointing", "none kept", "one kept", "half kept", "all but one kept",
        "all kept", "cache all, run all again",
    }  # fmt: skip
    assert all(side["ratio"]["median"] > 0 and side["over all kept"]["median"] > 0 for side in sides.values())
    estimate = estimate_memory(APINet("test_resnet", 200), 8, 32, chunk_size=4, keep_chunks=2)
    images = 4 * 8 * 3 * 32 * 32
    assert sides["all kept"]["estimate"] == estimate.total - estimate.parameters - estimate.optimizer - images


DOCUMENTS = ("README.md", "benchmarks/README.md")


def test_report_draws_what_was_measured(measured, tmp_path):
    measured = json.loads(json.dumps(measured))
    seconds = {"low": 0.004, "median": 0.00456, "high": 0.005}
    measured["head"][0]["sides"]["published"] |= {"seconds": seconds, "rounds": 5}
    for document in DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    folder = tmp_path / "benchmarks" / "results"
    older = measured | {"origin": measured["origin"] | {"date": "2000-01-01", "python": "2.7"}, "quick": False}
    for found in (measured, measured | {"quick": False}, older):
        file = write_json(folder, found, "-quick" * found["quick"])
        assert json.loads(file.read_text())["quick"] == found["quick"]
    assert len(list(folder.iterdir())) == 3

    results = newest(folder)
    assert results["cuda"] is None
    assert results["cpu"]["origin"] == measured["origin"]

    def drawn():
        report.report(tmp_path)
        return [(tmp_path / document).read_text() for document in DOCUMENTS]

    short, long = drawn()
    assert (folder / "mining-cpu.png").stat().st_size > 10_000
    assert "not yet measured |" in short
    assert measured["origin"]["device"] in short
    assert "4.56 ±0.50 (" in long
    assert drawn() == [short, long], "once more changes nothing"


def test_tables_say_why_figures_are_missing_and_what_is_not_as_it_should_be(measured):
    points = json.loads(json.dumps(measured["mining"]))
    points[0]["sides"]["torch.cdist"] = {"absent": "skipped: would take more time"}
    side = {"seconds": {"low": 0.1, "median": 0.2, "high": 0.3}, "rounds": 1, "ratio": {"median": 2.0}}
    points[0]["sides"]["dense torch"] = side | {"agreement": 1.0, "syncs": 0}
    points[0]["sides"][report.AUTO] = side | {"agreement": 0.846, "syncs": 3}
    for point in points[2:]:
        point["sides"]["dense torch"] = {"absent": "out of memory"}
        point["sides"][report.AUTO] = {"absent": "RuntimeError: device-side assert"}
    points[1]["sides"] = {name: {"absent": "skipped: would take more time"} for name in points[1]["sides"]}
    text = report.tables(points)
    assert {
        "- torch.cdist, 8/2048: skipped: would take more time",
        "- dense torch, 16/2048, 16/4: out of memory",
        "- ours, auto, 16/2048, 16/4: RuntimeError: device-side assert",
        "- all, 8/4: not reached in the time there was",
    } <= {*text.split("\n")}
    cells = ("skipped", "out of memory", "failed", "200 (2.000)", "200 (2.000), 85% right, 3 waits")
    assert all(f"| {words} |" in text for words in cells)


def test_documents_show_the_committed_results():
    for document, contents in blocks(newest(RESULTS)).items():
        text = (ROOT / document).read_text()
        assert fill(text, contents) == text, f"{document}: run benchmarks/report.py"
    for file in RESULTS.glob("*.json"):
        if "chunks" in (found := load(file)):
            assert section(found) in file.with_suffix(".md").read_text(), f"{file}: run benchmarks/report.py"
    # Of older scripts, by hand: 29.02 and 3.79 GiB, and the first chunks to be picked.
    assert "| resnet101 | 448 | 29,718 | 3,882 |" in section(load(RESULTS / "nvidia-h200-2026-11-26-chunks.json"))
    assert "| 0 | 12, 1 kept | 8, 2 kept |" in section(load(RESULTS / "amd-epyc-cpu-2026-11-24-memory.json"))
    with pytest.raises(ValueError, match="expected markers"):
        fill("no markers", {"summary": ""})
