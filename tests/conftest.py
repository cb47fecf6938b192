"""Data sets that several test files use."""

from pathlib import Path

import pytest
from birds import write_birds
from cub_folder import write_cub


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """A folder in CUB's official format, to read or to damage."""
    return write_cub(tmp_path / "CUB_200_2011")


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny embedded set: 6 species with 6 images each."""
    root = tmp_path_factory.mktemp("data") / "CUB_200_2011"
    return write_birds(root, species=6, images_per_species=6, size=40, workers=0, progress=False)
