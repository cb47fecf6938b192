"""The CUB example on two ranks, started by torchrun as on two GPUs: what one process does, done once, by both."""

import json
import re

import pytest
import torch
from commands import ROOT, TORCHRUN, finish
from cub_runs import TINY, rows, same, weights

import score
import train_cub
from workbench.images import eval_transform

# 5 species: 25 test images, which two ranks cannot share equally.
BIRDS = [*TINY, "--species", "5", "--images-per-species", "10", "--image-size", "40", "--n-classes", "4"]
# The backbone learns from the second epoch on, and each rank's 4 images go through it in chunks.
API = [*BIRDS, "--frozen-epochs", "1", "--chunk-size", "2"]
# Nothing in it depends on who else is in the batch, or on chance: the gradient is a mean over images.
EXACT = [*BIRDS, "--backbone", "test_vit", "--backbone-args", '{"img_size": 32}', "--dropout", "0", "--lr", "0.01"]
RUNS = {
    "api": API,
    "api-exact": EXACT,
    "baseline-exact": [*EXACT, "--method", "baseline"],
    # With 8 images a batch, the memory is full in the second. The chunk size comes out as the whole batch.
    "memory-exact": [*EXACT, "--memory", "12", "--chunk-size", "auto"],
}


def on_two_ranks(*runs):
    return finish(*TORCHRUN, ROOT / "tests" / "helpers" / "cub_on_ranks.py", json.dumps(runs))


def told(output):
    """What each rank had at the end of a run."""
    return [torch.load(f"{output}-rank{rank}.pt", map_location="cpu", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of all runs, and what was said; after them, a rank was killed in one more, "killed"."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [{"flags": [*flags, "--output", str(folder / name)], "plain": name != "api"} for name, flags in RUNS.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # where the first run draws the embedded birds
        code, out, err = on_two_ranks(*runs, {"flags": resumable(folder), "kill_in_step": 8})
        assert all((folder / f"{name}-scores.json").exists() for name in RUNS), err
        assert code != 0
        yield folder, out, err


def resumable(folder):
    return [*API, "--output", str(folder / "killed"), "--checkpoint-minutes", "1e-9"]


def test_birds_are_drawn_by_one_rank_and_all_is_said_once(finished):
    folder, out, err = finished
    assert out.count("drawing the embedded birds") == 1
    assert [path.name.startswith("birds-") for path in (folder / "cache/apinet-head").iterdir()] == [True]
    for name in (*RUNS, "killed"):
        assert out.count(f"writing to {folder / name}\n") == 1
    assert len(re.findall(r"after 3 epochs: top-1", out)) == len(RUNS)
    assert err.count("epoch 1/3:   0%") == len(RUNS) + 1
    assert out.count("--chunk-size auto: 0 (the whole batch for a batch of 4: ") == 1


def test_ranks_end_with_one_net_log_and_state_differ_in_chance_and_score_every_test_image_once(finished):
    for name in RUNS:
        first, second = told(finished[0] / name)
        assert same(first["weights"], second["weights"])
        assert same(first["weights"], weights(finished[0] / name / "last"))
        assert name != "api" or not torch.equal(first["random"], second["random"])
    output = finished[0] / "api"
    assert [(row["epoch"], row["step"]) for row in rows(output)] == [("1", "3"), ("2", "6"), ("3", "9")]
    assert len(list((output / "tensorboard").iterdir())) == 1
    assert sorted(path.name for path in (output / "state").iterdir()) == ["epoch-0002", "epoch-0003"]
    assert json.loads((output / "last" / "config.json").read_text())["gather"] is True
    assert not list(output.rglob("*.partial"))
    alone = score.main([str(output / "last"), "--device", "cpu"])
    assert alone["images"] == 25
    assert json.loads((finished[0] / "api-scores.json").read_text()) == alone
    for rank in told(output):
        assert alone.items() <= rank["result"].items()


@pytest.mark.parametrize("name", ["api-exact", "baseline-exact", "memory-exact"])
def test_two_ranks_train_as_one_process_with_the_whole_batch(finished, tmp_path, monkeypatch, name):
    here, there = tmp_path / "run", finished[0] / name
    monkeypatch.setattr(train_cub, "train_transform", eval_transform)
    train_cub.main([*RUNS[name], "--output", str(here)])
    torch.testing.assert_close(weights(there / "last"), weights(here / "last"), atol=1e-5, rtol=1e-4)
    for one, other in zip(rows(here), rows(there), strict=True):
        figures = [{k: float(v or 0) for k, v in row.items()} for row in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_killed_rank_ends_the_run_and_resuming_ends_as_if_never_interrupted(finished, tmp_path):
    """In the same processes, a run follows whose classes the ranks cannot share: that is said once."""
    folder, _, err = finished
    assert re.search(r"Root Cause.*rank\s*: 1 .*exitcode\s*: -9 .*SIGKILL", err, flags=re.DOTALL)
    saved = max(path.name for path in (folder / "killed" / "state").iterdir() if not path.suffix)
    assert saved == "epoch-0002-batch-00001"
    with pytest.raises(SystemExit, match=r"holds a run of 2 process.* this is 1: .*--nproc_per_node=2"):
        train_cub.main(resumable(folder))

    refused = [*API, "--n-classes", "5", "--output", str(tmp_path / "run")]
    code, out, err = on_two_ranks({"flags": resumable(folder)}, {"flags": refused})
    assert out.count("resuming after epoch 2 of 3 and 1 of 3 batches") == 1, err
    for one, other in zip(told(folder / "killed"), told(folder / "api"), strict=True):
        one["result"]["seconds"] = other["result"]["seconds"]
        assert same(one, other)
    assert code != 0
    assert err.count("n_classes=5 must be divisible by world_size=2") == 1
    assert "[rank1]" not in err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_end_with_the_same_net(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [*API, "--device", "cuda", "--amp", "bf16", "--output", str(tmp_path / "run")]
    code, _, err = on_two_ranks({"flags": flags})
    assert code == 0, err
    first, second = told(tmp_path / "run")
    assert same(first["weights"], second["weights"])
