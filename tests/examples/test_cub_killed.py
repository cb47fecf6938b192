"""Runs of train_cub.py as processes of their own, ended by real signals and started again; a soak is slow."""

import os
import random
import signal
import time

import pytest
from commands import ROOT, TORCHRUN, start
from cub_runs import FULL, TINY, assert_ends_alike, run

TRAIN = ROOT / "examples" / "train_cub.py"
LONG = ["--epochs", "16", "--eval-every", "8", "--checkpoint-minutes", "0.001"]


def wait_for_checkpoints(process, output, count):
    """Until so many new ones were written, or the process has ended."""
    seen, end = set(), time.monotonic() + 60
    known = {path.name for path in (output / "state").glob("epoch-*")}
    while len(seen - known) < count and process.poll() is None:
        assert time.monotonic() < end, "no checkpoint in a minute"
        seen |= {path.name for path in (output / "state").glob("epoch-*") if not path.suffix}
        time.sleep(0.001)


def killed(birds, output, number, delay, *flags, launcher=()):
    """Start the run, and end its whole group after its next checkpoints and a delay; (exit code, what it said)."""
    arguments = [*launcher, TRAIN, *TINY, "--data", birds, "--output", output, *flags]
    process = start(*arguments, start_new_session=True)
    try:
        wait_for_checkpoints(process, output, 2)
        time.sleep(delay)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def test_sigkill_then_sigterm_to_a_whole_group_with_workers(birds, tmp_path):
    flags = [*FULL, *LONG]
    run(birds, tmp_path / "whole", *flags)
    assert killed(birds, tmp_path / "run", signal.SIGKILL, 0.05, *flags)[0] == -signal.SIGKILL
    code, said = killed(birds, tmp_path / "run", signal.SIGTERM, 0.1, *flags, "--workers", "2")
    assert code == 128 + signal.SIGTERM, said
    assert "the same command resumes from there" in said
    run(birds, tmp_path / "run", *flags)
    assert_ends_alike(tmp_path / "run", tmp_path / "whole", last="epoch-0016")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signals_to_two_ranks_stop_them_at_the_same_step(birds, tmp_path, number):
    flags = [*FULL, "--n-classes", "4", "--epochs", "400", "--eval-every", "400"]
    code, said = killed(birds, tmp_path / "run", number, 0.3, *flags, launcher=TORCHRUN)
    assert code not in (0, -signal.SIGKILL), said
    assert said.count("the same command resumes from there") == 1, said
    newest = max(path for path in (tmp_path / "run" / "state").glob("epoch-*"))
    assert f"saved as {newest}" in said
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list(newest.glob("process-*.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_again_and_again(birds, tmp_path, workers):
    flags = [*FULL, *LONG, "--epochs", "60", "--workers", workers]
    run(birds, tmp_path / "whole", *flags)
    rng, codes = random.Random(int(workers)), []
    while not codes or codes[-1]:
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        codes.append(killed(birds, tmp_path / "run", number, rng.uniform(0, 1), *flags)[0])
        assert codes[-1] in (0, -signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
        assert len(codes) < 60
    assert len(codes) > 3
    assert_ends_alike(tmp_path / "run", tmp_path / "whole", last="epoch-0060")
