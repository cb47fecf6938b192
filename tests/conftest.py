"""Data sets that several test files use."""

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from accelerate.state import AcceleratorState, GradientState
from cub_folder import write_cub

from birds import write_birds

# --doctest-modules would import them all, and what they register; the latter runs in a process of its own.
collect_ignore = ["helpers", "package/mining/interpreted.py"]


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """A folder in CUB's official format, to read or to damage."""
    return write_cub(tmp_path / "CUB_200_2011")


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedded set: 6 species with 6 images each."""
    root = tmp_path_factory.mktemp("data") / "CUB_200_2011"
    return write_birds(root, species=6, images_per_species=6, size=40, workers=0, progress=False)


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """What accelerate and transformers note for the whole process ends with the test."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
