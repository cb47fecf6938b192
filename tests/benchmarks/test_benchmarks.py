"""The benchmarks: that all sides do the same work, and that figures get into the documents as they were measured."""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import budget
import footprint
import head
import many_classes
import miners
import mining
import mining_stages
import pytest
import run
import tables
import torch
import train_step
from budget import Budget, Case
from published import Head
from reference import candidates, squared_distances
from report import blocks, fill, newest, report
from turns import Turns, reason, spread, summarise, take_turns

from apinet_head.mining import BACKENDS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ON_CUDA_ONLY = {"ours, triton", miners.GRAPH}


def nearest(features, labels):
    """Partners [2,B], by brute force."""
    distance = squared_distances(*2 * [features.double().numpy()])
    finite = features.isfinite().all(1).numpy()
    return torch.stack([
        torch.from_numpy(distance).masked_fill(~torch.from_numpy(allowed), torch.inf).argmin(1)
        for allowed in (candidates(*2 * [labels.numpy()], finite, same, 0) for same in (True, False))
    ])  # fmt: skip


@pytest.mark.parametrize(("size", "dim"), [(20, 7), (120, 33)])
def test_all_sides_find_the_nearest(size, dim):
    features, labels = mining.make_batch(Case(size, dim), CPU)
    assert labels.bincount().tolist() == [4] * (size // 4)
    right = nearest(features, labels)
    rows = torch.tensor([3, size - 1, 0])
    assert torch.equal(mining.right_partners(features, labels, rows), right[:, rows])
    found = miners.sides(CPU)
    assert {miners.LIMIT, miners.AUTO, "ours, dense", "ours, tiled", miners.PUBLISHED, "dense torch"} <= set(found)
    for name, side in found.items():
        if name not in ON_CUDA_ONLY | {miners.LIMIT} and "triton" not in name:  # other tests add backends
            partner = side(features, labels)()
            assert torch.equal(partner.view(2, size), right), name
            assert mining.agreement({name: partner}, features, labels) == {name: 1.0}
            assert mining.agreement({name: 0 * partner}, features, labels)[name] < 0.2


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
        train_step.make_step(backbone, 4, *one, images, labels)()
        assert not torch.equal(before, backbone.weight), name
        assert all(p.grad is not None for p in one[0].parameters()), name


def test_a_failing_side_leaves_the_others_their_turns():
    calls = []

    def fail():
        raise ValueError("no such device\nand more")

    turns = take_turns({"a": lambda: calls.append("a"), "b": fail, "c": lambda: calls.append("c")}, CPU, 0.0, 60)
    assert [sorted(calls[place : place + 2]) for place in (0, 2, 4, 6)] == 4 * [["a", "c"]]  # the first warms up
    assert len(calls) == 8
    assert turns.warm
    assert {name: len(values) for name, values in turns.seconds.items()} == {"a": 3, "c": 3}
    assert turns.absent == {"b": "not available: no such device"}


def test_a_long_first_round_is_the_only_one():
    turns = take_turns({"a": lambda: time.sleep(0.02)}, CPU, 10, alone=0.01)
    assert not turns.warm
    assert len(turns.seconds["a"]) == 1


def test_ratios_are_of_the_same_round():
    turns = Turns({"a": [1.0, 20.0, 30.0], "b": [10.0, 2.0, 60.0]}, {"c": "out of memory"}, warm=True)
    found = summarise(turns, "b")
    assert found["a"]["ratio"] == {"low": 0.3, "median": 0.5, "high": 5.25}
    assert found["a"]["seconds"] == {"low": 10.5, "median": 20.0, "high": 25.0}
    assert found["c"] == {"absent": "out of memory"}
    assert spread([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), "out of memory"),
        (MemoryError("out of memory: takes about 9 GiB"), "out of memory: takes about 9 GiB"),
        (MemoryError(), "out of memory"),
        (ValueError("x"), "not available: x"),
        (TypeError("x\ny"), "TypeError: x"),
    ],
)
def test_reasons_are_a_line(error, expected):
    assert reason(error) == expected


def test_what_would_take_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda: 10 * 2**30)
    plan = Budget(CPU, seconds=100)
    small, large = Case(1000, 8, memory=False), Case(4000, 8, memory=False)
    assert plan.refuse(["slow", "quick", "big"], large) == {}  # nothing is known yet
    plan.note_times(Turns({"slow": [1.0, 0.7], "quick": [0.01], "big": [0.01]}, {}, warm=True), small)
    plan.note_memory("big", small, 2**30, None)
    refused = plan.refuse(["slow", "quick", "big"], large)
    assert refused == {
        "slow": "skipped: one call would take about 11 s",
        "big": "skipped: would take about 16 GiB, and 10 are free",
    }
    plan.note_memory("quick", large, 0, "out of memory")
    assert plan.refuse(["quick"], Case(5000, 8)) == {"quick": "out of memory"}
    assert plan.refuse(["quick"], small) == {}
    # Of what is left to all, the first sides take their part.
    plan.longest, plan.end = 20.0, time.perf_counter() + 15
    plan.note_times(Turns({"slow": [0.5], "next": [0.5]}, {}, warm=True), small)
    assert plan.refuse(["slow", "next"], large) == {
        "next": "skipped: would take about 8 s, more than is left to the benchmark"
    }
    assert Budget(CPU, seconds=0).refuse(["quick"], large) == {}  # what nothing is known of is tried


def allocate(mebibytes):
    # More than is measured then: that is not to count, nor to hide what is.
    torch.empty(60 * 2**20 // 4).zero_()
    return footprint.growth_of_process(lambda: torch.empty(mebibytes * 2**20 // 4).zero_())


def end_by(how):
    os.kill(os.getpid(), how)


@pytest.mark.skipif(not footprint.can_measure_growth(), reason="needs Linux")
def test_memory_of_fresh_processes():
    # Linux counts pages for each core apart, and sums up when enough have come together.
    cores = os.cpu_count()
    slack = 1 + cores * max(32, 2 * cores) * 4096 / 2**20
    for expected in (5, 40):
        grown, failure = footprint.in_fresh_process(allocate, expected, seconds=60)
        assert failure is None
        assert abs(grown / 2**20 - expected) < slack
    assert footprint.in_fresh_process(end_by, signal.SIGKILL, seconds=60) == (None, "out of memory")
    assert footprint.in_fresh_process(end_by, signal.SIGABRT, seconds=60) == (None, "its process ended with -6")
    assert footprint.in_fresh_process(allocate, -4, seconds=60)[1].startswith("RuntimeError")
    assert footprint.in_fresh_process(time.sleep, 60, seconds=0.1) == (None, "took more than 0 s")


def test_bytes_saved_for_the_backward_pass():
    x, weight = torch.randn(10, requires_grad=True), torch.randn(10, requires_grad=True)
    saved, loss = footprint.saved_bytes(lambda: (x.exp() * weight).sum(), [weight])
    assert saved == 10 * 4  # exp keeps its result, which the product keeps too
    loss.backward()
    assert x.grad is not None


def tiny_plan(device):
    return {
        "mining": (mining, mining.cases_of((16, 8), (8, 4), ("float32",), device), 6.0),
        "head": (head, [head.Case(5, mining, batch=8, dim=8) for mining in (False, True)], 0.01),
        "train_step": (train_step, [train_step.Case("test_resnet", 32, 8)], 0.01),
    }


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        for name in set(BACKENDS) - {"dense", "tiled", "triton"}:
            patch.delitem(BACKENDS, name)  # of other tests' making: a fresh process doesn't know them
        return run.measure(tiny_plan(CPU), CPU, quick=True)


def check_measured(found, device):
    assert found["errors"] == {}
    assert [(point["size"], point["dim"]) for point in found["mining"]] == [(8, 8), (8, 4), (16, 8), (16, 4)]
    for part in ("mining", "head", "train_step"):
        for point in found[part]:
            for name, side in point["sides"].items():
                if "absent" in side:
                    assert name in ON_CUDA_ONLY, side
                else:
                    assert 0 < side["seconds"]["low"] <= side["seconds"]["median"] <= side["seconds"]["high"]
                    assert side["ratio"]["median"] > 0
    first = found["mining"][0]["sides"]
    assert {miners.LIMIT, miners.AUTO, "ours, dense", miners.PUBLISHED, "pytorch-metric-learning"} <= set(first)
    assert all(side["agreement"] == 1 for name, side in first.items() if name != miners.LIMIT and "absent" not in side)
    assert found["ceilings"]["flops"]["float32"] > 1e6
    assert set(found["origin"]) >= {"device", "cores", "threads", "date", "python", "versions"}
    assert found["head"][0]["sides"]["ours"]["saved"] < found["head"][0]["sides"]["published"]["saved"]


def test_all_parts_measure(measured):
    check_measured(measured, CPU)
    if footprint.can_measure_growth():
        assert "memory" in measured["mining"][0]["sides"]["torch.cdist"]


@pytest.mark.gpu
def test_all_parts_measure_on_a_gpu():
    device = torch.device("cuda")
    found = run.measure(tiny_plan(device), device, quick=True)
    check_measured(found, device)
    sides = found["mining"][0]["sides"]
    assert sides[miners.PUBLISHED]["syncs"] >= 2
    assert all(side["syncs"] == 0 for name, side in sides.items() if name.startswith("ours"))
    assert set(found["origin"]) >= {"driver", "capability"}


@pytest.mark.parametrize(("size", "dim"), [(8, 4), (150, 600)])  # with and without all products
def test_stages_of_mining_are_those_of_the_backend(size, dim):
    features, labels = mining.make_batch(Case(size, dim), CPU)
    results = {name: stage() for name, stage in mining_stages.stages(features, labels).items()}
    nearest_of_stages = results["… … the nearest candidates"].indices
    assert torch.equal(nearest_of_stages, nearest(features, labels))
    assert torch.equal(nearest_of_stages, results["mine_pairs"].partner.view(2, size))
    (of_backend,) = (found.partner for name, found in results.items() if "its backend" in name)
    assert torch.equal(nearest_of_stages, of_backend)


def test_stages_of_mining_are_measured(capsys):
    mining_stages.main(["--size", "8", "--dim", "4", "--seconds", "0.01"])
    assert "| … … candidate mask |" in capsys.readouterr().out


def test_many_classes_are_measured(monkeypatch):
    many_classes.check_same(CPU)
    monkeypatch.setattr(many_classes, "can_measure_growth", lambda: False)
    text = many_classes.table([(30, 8, many_classes.measure(30, 8, CPU, seconds=0.01))])
    assert len(text.split("\n")) == 2 + len(many_classes.CRITERIA)


def test_a_part_that_fails_leaves_the_others(monkeypatch):
    monkeypatch.setattr(head, "check_same", lambda device: 1 / 0)
    plan = tiny_plan(CPU)
    found = run.measure({name: plan[name] for name in ("head", "train_step")}, CPU, quick=True)
    assert found["errors"] == {"head": "ZeroDivisionError: division by zero"}
    assert len(found["train_step"]) == 1


DOCUMENTS = ("README.md", "benchmarks/README.md")


def test_report_draws_what_was_measured(measured, tmp_path):
    measured = json.loads(json.dumps(measured))
    known = {"seconds": {"low": 0.004, "median": 0.00456, "high": 0.005}, "rounds": 5}
    measured["head"][0]["sides"]["published"] |= known
    for document in DOCUMENTS:
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text((ROOT / document).read_text())
    folder = tmp_path / "benchmarks" / "results"
    older = measured | {"origin": measured["origin"] | {"date": "2000-01-01", "python": "2.7"}, "quick": False}
    for found in (measured, measured | {"quick": False}, older):
        file = run.write(found, folder)
        assert json.loads(file.read_text())["quick"] == found["quick"]
    assert len(list(folder.iterdir())) == 3
    (folder / "other.json").write_text('{"origin": {"date": "2999-01-01", "type": "cpu"}}')

    results = newest(folder)
    assert results["cuda"] is None
    assert results["cpu"]["origin"] == measured["origin"]
    report(tmp_path, results)
    assert (folder / "mining-cpu.png").stat().st_size > 10_000
    short, long = [(tmp_path / document).read_text() for document in DOCUMENTS]
    assert "not yet measured |" in short
    assert measured["origin"]["device"] in short
    assert "| 4.56 ±0.50 |" in long
    # Once more changes nothing, and without results all is as before.
    report(tmp_path, results)
    assert [(tmp_path / document).read_text() for document in DOCUMENTS] == [short, long]


def test_figures_that_are_missing_say_why(measured):
    points = json.loads(json.dumps(measured["mining"]))
    points[0]["sides"]["torch.cdist"] = {"absent": "skipped: one call would take about 40 s"}
    for point in points[2:]:
        point["sides"]["dense torch"] = {"absent": "out of memory"}
        point["sides"][miners.AUTO] = {"absent": "RuntimeError: device-side assert"}
    text = tables.mining_tables(points, measured["ceilings"])
    for line in (
        "- torch.cdist, B=8 at D=8: skipped: one call would take about 40 s",
        "- dense torch, B=16: out of memory",
        "- ours, auto, B=16: RuntimeError: device-side assert",
    ):
        assert line in text.split("\n")
    assert "| skipped |" in text
    assert "| out of memory |" in text
    assert "| failed |" in text


def test_documents_show_the_committed_results():
    for document, contents in blocks(newest(run.RESULTS)).items():
        text = (ROOT / document).read_text()
        assert fill(text, contents) == text, f"{document}: run benchmarks/report.py"
    with pytest.raises(ValueError, match="expected markers"):
        fill("no markers", {"summary": ""})


def test_published_head_has_the_published_sizes():
    shapes = {name: tuple(value.shape) for name, value in Head(2048, 200).state_dict().items()}
    assert shapes["map1.weight"] == (512, 4096)
    assert shapes["map2.weight"] == (2048, 512)
    assert shapes["fc.weight"] == (200, 2048)
