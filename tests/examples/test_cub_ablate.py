"""The ablation's rows, and its table on a tiny set of birds."""

import csv

import pytest
from cub_runs import TINY, train_here

import ablate
from workbench.settings import parse


def test_rows_are_all_of_the_papers_parts_and_their_flags_are_understood():
    rows = ablate.rows_of(parse([]))
    assert len({row.key for row in rows}) == 22
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    for group in ("method", "mutual vector", "gate", "loss", "pairs", "classes in a batch", "images of a class"):
        names = [row for row in rows if row.group == group]
        assert len([row for row in names if not row.flags]) == 1, f"{group} has the unchanged method once"
    for row in rows:
        changed = parse([*row.flags])
        assert (changed != parse([])) == bool(row.flags)


def test_a_part_runs_and_goes_on_where_it_stopped(birds, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch)
    flags = ["--only", "gate", "--seeds", "2", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    flags += [*TINY, "--data", str(birds), "--epochs", "1"]
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)  # of this process, not of the runs
    monkeypatch.setattr("sys.argv", ["ablate.py", *flags])
    ablate.main()
    names = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert names == {
        f"{key}-seed{seed}" for key in ("default", "rank-weight-0", "gate-single-rank-weight-0") for seed in (0, 1)
    }
    table = (tmp_path / "out" / "ablation.md").read_text()
    assert "| gate | single |" in table
    assert "| gate | **pair** |" in table
    assert "; 1 thread, Python" in table
    assert table in capsys.readouterr().out
    with (tmp_path / "out" / "ablation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 10_000

    monkeypatch.setattr("workbench.sweep._start", lambda *job: pytest.fail(f"{job} was finished before"))
    ablate.main()
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["ablate.py", *flags, "--output", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match=r"^--output \S+file cannot be written: File exists$"):
        ablate.main()
    monkeypatch.setattr("sys.argv", ["ablate.py", *flags, "--lr", "0.5"])
    with pytest.raises(SystemExit, match=r"lr: 0.05 there, 0.5 here"):
        ablate.main()


def test_memories_are_compared_in_small_batches(birds, tmp_path, monkeypatch, capsys):
    train_here(monkeypatch)
    monkeypatch.setattr(ablate, "SIZES", (16,))
    flags = ["--only", "memory", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["ablate.py", *flags, *TINY, "--data", str(birds), "--epochs", "1"])
    ablate.main()
    table = (tmp_path / "out" / "memory.md").read_text()
    assert table in capsys.readouterr().out
    for variant in ("**none**", "16"):
        assert f"| memory, batches of 3 classes x 2 images | {variant} |" in table
    assert len((tmp_path / "out" / "memory.csv").read_text().splitlines()) == 1 + 2


def test_a_part_that_there_is_not_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablate.py", "--only", "magic"])
    with pytest.raises(SystemExit):
        ablate.main()
    assert "--only magic: there are method, mutual vector" in capsys.readouterr().err
