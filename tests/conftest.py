"""Data sets that several test files use."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from colours import SHORT, write_colours

from birds.dataset import write_birds

# --doctest-modules would import them all, and what they register.
collect_ignore = ["helpers"]


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_many_processes() -> None:
    """Where pytest-xdist runs tests on all cores, threads, also of processes they start, would wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedded set: 6 species with 6 images each."""
    root = tmp_path_factory.mktemp("data") / "CUB_200_2011"
    return write_birds(root, species=6, images_per_species=6, size=60, workers=0, progress=False)


@pytest.fixture(scope="session")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of train_own.py on colours; its parent has the images."""
    import train_own  # takes seconds, and most tests do without it

    root = write_colours(tmp_path_factory.mktemp("own") / "colours")
    train_own.main([str(root), "--out", str(root / "model"), *SHORT, "--epochs", "20", "--lr", "0.01"])
    return root / "model"


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """What accelerate and transformers note for the whole process ends with the test."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
