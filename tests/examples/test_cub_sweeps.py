"""Many runs of train_cub.py on a tiny set of birds: the ablation's rows and tables, and the demo."""

import json
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from cub_runs import TINY

import ablate
import demo
import train_cub
from workbench.settings import parse


def test_rows_are_all_of_the_papers_parts_and_their_flags_are_understood():
    rows = ablate.rows_of(parse([]))
    assert len({row.key for row in rows}) == 22
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    for group in ("method", "mutual vector", "gate", "loss", "pairs", "classes in a batch", "images of a class"):
        assert [row.flags for row in rows if row.group == group].count(()) == 1, (
            f"{group} has the unchanged method once"
        )
    for row in rows:
        assert (parse([*row.flags]) != parse([])) == bool(row.flags)


@pytest.fixture
def sweep(birds, tmp_path, monkeypatch):
    """Has a command train with these flags, in this process, for others spend seconds on importing torch."""

    def started(flags, log):
        train_cub.main(flags)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    def swept(command, *flags):
        folders = ["--data", str(birds), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["command", *TINY, "--epochs", "1", *folders, *flags])
        command.main()

    monkeypatch.setattr("workbench.sweep._start", started)
    monkeypatch.setattr("workbench.sweep.time", Mock())  # there is nothing to wait for
    return swept


def test_a_part_runs_and_goes_on_where_it_stopped(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)  # of this process, not of the runs
    gate = ["--only", "gate", "--seeds", "2"]
    sweep(ablate, *gate)
    table = (tmp_path / "ablation.md").read_text()
    assert table in capsys.readouterr().out
    keys = ("default", "rank-weight-0", "gate-single-rank-weight-0")
    names = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert names == {f"{key}-seed{seed}" for key in keys for seed in (0, 1)}
    assert all(f"| gate | {variant} |" in table for variant in ("single", "**pair**"))
    assert "; 1 thread, Python" in table
    assert len((tmp_path / "ablation.csv").read_text().splitlines()) == 1 + 6
    assert (tmp_path / "ablation.png").stat().st_size > 10_000

    monkeypatch.setattr("workbench.sweep._start", lambda *job: pytest.fail(f"{job} was finished before"))
    sweep(ablate, *gate, "--chunk-size", "auto", "--keep-chunks", "2")  # with auto, the runs have their own numbers
    with pytest.raises(SystemExit, match=r"^--output \S+csv cannot be written: File exists$"):
        sweep(ablate, *gate, "--output", str(tmp_path / "ablation.csv"))
    with pytest.raises(SystemExit, match=r"lr: 0.05 there, 0.5 here"):
        sweep(ablate, *gate, "--lr", "0.5")
    with pytest.raises(SystemExit):
        sweep(ablate, "--only", "magic")
    assert "--only magic: there are method, mutual vector" in capsys.readouterr().err


def test_memories_are_compared_in_small_batches(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "SIZES", (16,))
    sweep(ablate, "--only", "memory", "--seeds", "1")
    for variant in ("**none**", "16"):
        assert f"| memory, batches of 3 classes x 2 images | {variant} |" in (tmp_path / "memory.md").read_text()
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 1 + 2


def test_demo_compares_the_methods(sweep, tmp_path, capsys):
    sweep(demo, "--seeds", "1")
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    for method, title in demo.METHODS.items():
        folder = tmp_path / "runs" / f"{method}-seed0"
        result = json.loads((folder / "result.json").read_text())
        assert re.search(rf"\| {title} \|.* {result['test_top1']:.1f} ", table)
        assert json.loads((folder / "settings.json").read_text())["method"] == method


def test_runs_are_processes_and_it_is_shown_why_one_failed(sweep, tmp_path, monkeypatch):
    monkeypatch.undo()  # so they are not in this one
    (tmp_path / "torch.py").write_text("import sys; sys.exit(' '.join(sys.argv))")  # in place of torch
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^baseline-seed0 failed:\n\S+train_cub\.py .* --lr 0.5 --method baseline"):
        sweep(demo, "--seeds", "1", "--jobs", "1", "--lr", "0.5")
