"""The ablation's rows, and its tables on a tiny set of birds."""

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
        assert (parse([*row.flags]) != parse([])) == bool(row.flags)


@pytest.fixture
def run(birds, tmp_path, monkeypatch, capsys):
    """Runs a part, and gives its table."""
    train_here(monkeypatch)
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)  # of this process, not of the runs

    def part(name, seeds, *more, table):
        flags = ["--only", name, "--seeds", seeds, "--runs", str(tmp_path / "runs"), "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["ablate.py", *flags, *TINY, "--data", str(birds), "--epochs", "1", *more])
        ablate.main()
        text = (tmp_path / table).read_text()
        assert text in capsys.readouterr().out
        return text

    return part


def test_a_part_runs_and_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    table = run("gate", "2", table="ablation.md")
    keys = ("default", "rank-weight-0", "gate-single-rank-weight-0")
    names = {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()}
    assert names == {f"{key}-seed{seed}" for key in keys for seed in (0, 1)}
    assert "| gate | single |" in table
    assert "| gate | **pair** |" in table
    assert "; 1 thread, Python" in table
    with (tmp_path / "ablation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert (tmp_path / "ablation.png").stat().st_size > 10_000

    monkeypatch.setattr("workbench.sweep._start", lambda *job: pytest.fail(f"{job} was finished before"))
    run("gate", "2", table="ablation.md")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^--output \S+file cannot be written: File exists$"):
        run("gate", "2", "--output", str(tmp_path / "file"), table="")
    with pytest.raises(SystemExit, match=r"lr: 0.05 there, 0.5 here"):
        run("gate", "2", "--lr", "0.5", table="")


def test_memories_are_compared_in_small_batches(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "SIZES", (16,))
    table = run("memory", "1", table="memory.md")
    for variant in ("**none**", "16"):
        assert f"| memory, batches of 3 classes x 2 images | {variant} |" in table
    assert len((tmp_path / "memory.csv").read_text().splitlines()) == 1 + 2


def test_a_part_that_there_is_not_is_named(run, capsys):
    with pytest.raises(SystemExit):
        run("magic", "1", table="")
    assert "--only magic: there are method, mutual vector" in capsys.readouterr().err
