"""workbench/datasets: each of the paper's data sets is read from its official format, and chosen by --dataset."""

import json
from pathlib import Path
from typing import Any

import dataset_folders as folders
import numpy as np
import pytest
from cub_runs import TINY
from dataset_folders import dog_rows, write
from scipy.io import savemat

import score
import train_cub
from workbench.datasets import ARCHIVES, READERS, open_data
from workbench.datasets.bird_lists import family
from workbench.settings import PRESETS, RECIPES, Settings, parse, run_folder


@pytest.mark.parametrize("name", READERS)
def test_what_all_have_in_common(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(name, tmp_path)
    found = READERS[name](root)
    assert found.name == ARCHIVES[name].name
    assert {image.label for image in found.train} == set(range(len(found.classes)))
    assert {image.label for image in found.test} <= set(range(len(found.classes)))
    assert len(found.families) in (0, len(found.classes))
    images = found.train + found.test
    assert all(image.path.is_file() for image in images)
    assert len({image.path for image in images}) == len({image.image_id for image in images}) == len(images)

    for given in (str(root), *([root.parent] if ARCHIVES[name].folders else [])):
        assert READERS[name](given) == found
    settings = parse(["--dataset", name, "--data", str(root)])
    assert open_data(settings) == found
    assert run_folder(settings).name == f"{root.name}-api-resnet101-seed0"
    monkeypatch.chdir(root)
    assert [root / image.path for image in READERS[name](Path(".")).train] == [image.path for image in found.train]


def test_cub(cub: Path) -> None:
    found = READERS["cub"](cub)
    assert found.classes == ["003.Sooty_Albatross", "020.Great_Auk"]
    assert found.families == ["Albatross", "Auk"]
    images = cub / "images"
    assert found.train == [(images / "020.Great_Auk/Auk 2.jpg", 1, 7), (images / "003.Sooty_Albatross/b.jpg", 0, 30)]
    assert found.test == [(images / "003.Sooty_Albatross/a.jpg", 0, 2), (images / "020.Great_Auk/Auk_1.jpg", 1, 4)]
    assert [family(name) for name in ("105.Whip_poor_Will", "091.Mockingbird", "Sparrow")] == [
        "Will", "Mockingbird", "Sparrow",
    ]  # fmt: skip


def test_lists_from_other_systems(cub: Path) -> None:
    expected = READERS["cub"](cub)
    for name in folders.CUB:  # byte order mark, Windows' line ends, blank lines at the end, spaces around
        text = folders.CUB[name].replace("\n", " \n") + "\n\n"
        (cub / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert READERS["cub"](cub) == expected


@pytest.mark.parametrize("inside", ["", "data"])
def test_aircraft(tmp_path: Path, inside: str) -> None:
    root = write("aircraft", tmp_path)
    found = READERS["aircraft"](root / inside)
    assert found.classes == list(folders.AIRCRAFT)
    assert found.families == list(folders.AIRCRAFT.values())
    assert [image.label for image in found.train] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found.train[1] == (root / "data/images/0034310.jpg", 1, "0034310")
    assert [image.image_id for image in found.test] == ["0034317", "0034318", "0034319", "0034320"]


@pytest.mark.parametrize("labels_in", ["", "devkit"])
def test_cars(tmp_path: Path, labels_in: str) -> None:
    root = write("cars", tmp_path)
    (root / "cars_test_annos_withlabels.mat").rename(root / labels_in / "cars_test_annos_withlabels.mat")
    found = READERS["cars"](root)
    assert found.classes == folders.CARS
    assert found.families == ["AM", "Acura", "Acura"]
    assert found.train[0] == (root / "cars_train/00001.jpg", 2, "cars_train/00001.jpg")
    assert [image.label for image in found.train] == [2, 0, 1, 0]
    assert [image.path.name for image in found.test] == ["00001.jpg", "00002.jpg"]
    assert [image.label for image in found.test] == [1, 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_dogs(tmp_path: Path, dtype: Any) -> None:
    root = write("dogs", tmp_path)
    (root / "lists").mkdir()
    (root / "train_list.mat").unlink()
    folders.write_dog_list(root / "lists/train_list.mat", dog_rows([5927, 16])[::-1], dtype)
    found = READERS["dogs"](root)
    assert found.classes == folders.DOGS
    assert found.families == []
    name = "n02113799-standard_poodle/n02113799_16.jpg"
    assert found.train[0] == (root / "Images" / name, 2, name)
    assert [image.label for image in found.train] == [2, 1, 0, 2, 1, 0]
    assert [image.label for image in found.test] == [0, 1]


def test_nabirds(tmp_path: Path) -> None:
    root = write("nabirds", tmp_path)
    found = READERS["nabirds"](root)
    assert found.classes == ["Oldsquaw (Breeding male)", "Mallard (Female/Eclipse male)", "Oldsquaw (Female)"]
    assert found.families == ["Oldsquaw", "Mallard", "Oldsquaw"]
    assert [image.label for image in found.train] == [1, 0, 2] == [image.label for image in found.test]
    path = root / "images/0295/0000000221dc4d0cbfe14cae3c85c829.jpg"
    assert found.train[1] == (path, 0, "00000002-21dc-4d0c-bfe1-4cae3c85c829")


def test_one_row_is_a_list_too(tmp_path: Path) -> None:
    """SciPy, told to squeeze, hands out a list of one as its element."""
    (tmp_path / "devkit").mkdir()
    savemat(tmp_path / "devkit/cars_meta.mat", {"class_names": folders.cells(folders.CARS[:1])})
    for file, folder in (("devkit/cars_train_annos.mat", "train"), ("cars_test_annos_withlabels.mat", "test")):
        folders.write_annotations(tmp_path / file, [1])
        folders.draw(tmp_path / f"cars_{folder}/00001.jpg")
    assert [image.label for image in READERS["cars"](tmp_path).train] == [0]
    for file, number in (("train_list.mat", 1), ("test_list.mat", 2)):
        folders.write_dog_list(tmp_path / file, dog_rows([number])[:1])
        folders.draw(tmp_path / "Images" / dog_rows([number])[0][0])
    assert READERS["dogs"](tmp_path).classes == folders.DOGS[:1]


def test_recipes() -> None:
    assert all(recipe.keys() <= vars(Settings()).keys() for recipe in RECIPES.values())
    assert RECIPES.keys() <= READERS.keys()

    def recipe(*flags: str) -> tuple[int, float, int]:
        settings = parse(["--data", "folder", *flags])
        return settings.epochs, settings.lr, settings.frozen_epochs

    assert recipe("--dataset", "dogs") == recipe("--preset", "paper", "--dataset=dogs") == (50, 0.001, 12)
    assert recipe("--dataset", "dogs", "--epochs", "7") == (7, 0.001, 12)
    demo = PRESETS["demo"]
    assert recipe("--dataset", "dogs", "--preset", "demo") == (demo["epochs"], demo["lr"], demo["frozen_epochs"])
    for name in READERS.keys() - RECIPES.keys():
        assert recipe("--dataset", name) == recipe() == (100, 0.01, 8)


@pytest.mark.parametrize("name", [name for name in READERS if name != "cub"])
def test_only_birds_are_embedded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--dataset", name])
    archive = ARCHIVES[name]
    assert f"--dataset {name} needs --data, {archive.expected}. {archive.source}" in capsys.readouterr().err


def test_training_and_evaluating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("aircraft", Path("."))
    result = train_cub.main([*TINY, "--dataset", "aircraft", "--data", "fgvc-aircraft-2013b", "--epochs", "1"])
    run = tmp_path / "runs/fgvc-aircraft-2013b-api-test_resnet-seed0"
    assert json.loads((run / "settings.json").read_text())["dataset"] == "aircraft"
    assert json.loads((run / "last/classes.json").read_text())["classes"] == list(folders.AIRCRAFT)
    assert result["images"] == 4
    found = score.main([str(run / "last"), "--device", "cpu"])
    assert found["test_top1"] == pytest.approx(result["test_top1"])
