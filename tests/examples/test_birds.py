"""The embedded birds: the folder is CUB's, its bytes follow from the seed, and species differ where they say."""

import hashlib
import itertools
import json
import runpy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from birds.dataset import catalogue, differing_parts, read_species, write_birds
from birds.draw import MARKED_PARTS, PARTS, draw_bird
from workbench.datasets.bird_lists import read_cub

# Of the fixture `birds`.
SMALL = {"species": 6, "images_per_species": 6, "size": 60, "workers": 1, "progress": False}


def rows(root: Path, name: str) -> list[list[str]]:
    return [line.split(" ") for line in (root / f"{name}.txt").read_text().splitlines()]


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_follow_from_the_seed(birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("birds.dataset.FEW_IMAGES", 0)  # so that the workers really are used
    first = digests(birds)
    assert digests(write_birds(tmp_path / "again", **SMALL | {"workers": 2})) == first
    other = digests(write_birds(tmp_path / "other", **SMALL, seed=1))
    assert other.keys() == first.keys()
    assert not any(other[name] == digest for name, digest in first.items() if name.endswith(".jpg"))


def test_lists_are_read_as_cubs_with_half_of_each_species_for_training_and_json_tells_the_species(birds: Path) -> None:
    data = read_cub(birds)  # checks the lists against each other and the files
    labels = np.repeat(range(SMALL["species"]), SMALL["images_per_species"] // 2).tolist()
    assert [image.label for image in data.train] == labels == [image.label for image in data.test]
    for image in data.train + data.test:
        assert image.path.parent.name == data.classes[image.label]
        with Image.open(image.path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (60, 60))
    ids = [str(i) for i in range(1, 2 * len(labels) + 1)]
    assert [row[0] for row in rows(birds, "bounding_boxes")] == ids
    assert [row[:2] for row in rows(birds, "parts/part_locs")] == [[i, str(k)] for i in ids for k in range(1, 8)]
    assert rows(birds, "parts/parts") == [[str(k), part] for k, part in enumerate(PARTS, 1)]
    assert len(list((birds / "images").rglob("*.jpg"))) == len(ids)
    assert list(read_species(birds)) == data.classes
    assert list(read_species(birds).values()) == catalogue(SMALL["species"])
    first = json.loads((birds / "birds.json").read_text())["classes"][0]
    assert (first["name"], first["family"]) == ("001.White_Barred_Tern", "Tern")
    assert first["traits"]["bar"] == ["single", "white"]


def test_boxes_and_visible_parts_are_in_the_image(birds: Path) -> None:
    corners, sizes = np.split(np.loadtxt(birds / "bounding_boxes.txt")[:, 1:], 2, axis=1)
    assert corners.min() >= 0
    assert sizes.min() > 8
    assert (corners + sizes).max() <= SMALL["size"]
    places, visible = np.split(np.loadtxt(birds / "parts/part_locs.txt")[:, 2:].reshape(len(sizes), -1, 3), [2], axis=2)
    assert not places[visible[..., 0] == 0].any()
    is_inside = (places >= corners[:, None] - 2) & (places <= (corners + sizes)[:, None] + 2)
    assert np.all(is_inside | (visible == 0))
    assert 0 < (visible == 0).mean() < 0.2


@pytest.mark.parametrize("number", [2, 3, 7, 20, 200])
def test_catalogue(number: int) -> None:
    species = catalogue(number)
    assert len({s.name for s in species}) == len(species) == number
    assert all(s.name.rpartition("_")[2] == s.family.name for s in species)
    for a, b in itertools.combinations(species, 2):
        if a.family is b.family:
            assert 1 <= len(differing_parts(a, b)) <= 2
            assert differing_parts(a, b) <= set(a.family.varies)


def test_differing_parts_are_of_one_family_and_each_varies_in_some() -> None:
    species = catalogue(200)
    assert differing_parts(species[0], species[1]) == {"bar"}
    assert differing_parts(species[0], species[0]) == frozenset()
    with pytest.raises(ValueError, match="different families"):
        differing_parts(species[0], species[-1])
    assert {part for s in species for part in s.family.varies} == set(MARKED_PARTS)


# How far from its part's place a mark reaches, as a share of the box's longer side.
REACH = {"beak": 0.4, "crown": 0.3, "eye": 0.1, "bar": 0.3, "belly": 0.5, "tail": 0.35}


@pytest.mark.parametrize("family", range(40))
def test_species_of_a_family_differ_near_the_named_parts(family: int) -> None:
    first, *others = catalogue(200)[5 * family : 5 * family + 5]
    for state, other in enumerate(others):
        a, b = (draw_bird(s, np.random.default_rng((family, state)), 96) for s in (first, other))
        gap = np.abs(np.asarray(a.picture, float) - np.asarray(b.picture, float)).max(axis=2)
        ys, xs = np.nonzero(gap > 24)
        parts = differing_parts(first, other)
        if all(a.parts[part][2] for part in parts):
            assert len(xs) >= 4, f"{first.name} and {other.name} look the same"
            near = [np.hypot(xs - a.parts[p][0], ys - a.parts[p][1]) < REACH[p] * max(a.box[2:]) for p in parts]
            assert np.any(near, axis=0).mean() > 0.97, f"{first.name} and {other.name} differ beyond {set(parts)}"
        for part in set(PARTS) - parts:
            assert a.parts[part] == b.parts[part]


@pytest.mark.parametrize("size", [32, 128, 129, 160, 193, 448])
def test_every_size(size: int) -> None:
    bird = draw_bird(catalogue(2)[0], np.random.default_rng(0), size)
    assert bird.picture.size == (size, size)
    assert 0.4 * size < bird.box[2] <= size


def test_same_folder_is_kept_and_another_refused(birds: Path, tmp_path: Path) -> None:
    before = (birds / "birds.json").stat().st_mtime_ns
    assert write_birds(birds, **SMALL) == birds
    assert (birds / "birds.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match=r"'seed': 0.*another folder"):
        write_birds(birds, **SMALL, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        write_birds(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    interrupted = mock.Mock(wraps=draw_bird, side_effect=[*[mock.DEFAULT] * 9, KeyboardInterrupt])
    with mock.patch("birds.dataset.draw_bird", interrupted), pytest.raises(KeyboardInterrupt):
        write_birds(tmp_path / "birds", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("species", 1), ("species", 100_000), ("images_per_species", 1), ("size", 31), ("seed", -1)]
)
def test_arguments_out_of_range(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be .*got {value}"):
        write_birds(tmp_path / "birds", **SMALL | {name: value})
    assert list(tmp_path.iterdir()) == []


def test_command_writes_them_and_a_sheet_of_every_species(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--species", "6", "--images-per-species", "2", "--size", "32", "--workers", "1"]
    output, sheet = tmp_path / "birds", tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["birds.py", "--output", str(output), *asked, "--contact-sheet", str(sheet)])
    runpy.run_module("birds", run_name="__main__")
    assert len(rows(output, "images")) == 12
    assert Image.open(sheet).height >= 6 * 128
