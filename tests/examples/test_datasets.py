"""workbench/datasets: each of the paper's data sets is read from its official format, and chosen by --dataset."""

import json
from pathlib import Path

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
from workbench.settings import PRESETS, parse, run_folder

POODLE = "n02113799-standard_poodle/n02113799_16.jpg"
# Of each: the classes, their families, the labels for training and testing, and one training image: place, path and id.
EXPECTED = {
    "cub": (
        ["003.Sooty_Albatross", "020.Great_Auk"], ["Albatross", "Auk"], [1, 0], [0, 1],
        (1, "images/003.Sooty_Albatross/b.jpg", 30),
    ),
    "cars": (
        folders.CARS, ["AM", "Acura", "Acura"], [2, 0, 1, 0], [1, 1],
        (0, "cars_train/00001.jpg", "cars_train/00001.jpg"),
    ),
    "aircraft": (
        list(folders.AIRCRAFT), list(folders.AIRCRAFT.values()), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3],
        (1, "data/images/0034310.jpg", "0034310"),
    ),
    "dogs": (folders.DOGS, [], [0, 1, 2, 0, 1, 2], [0, 1], (5, f"Images/{POODLE}", POODLE)),
    "nabirds": (
        ["Oldsquaw (Breeding male)", "Mallard (Female/Eclipse male)", "Oldsquaw (Female)"],
        ["Oldsquaw", "Mallard", "Oldsquaw"], [1, 0, 2], [1, 0, 2],
        (1, "images/0295/0000000221dc4d0cbfe14cae3c85c829.jpg", "00000002-21dc-4d0c-bfe1-4cae3c85c829"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_official_folder_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, (classes, families, train, test, (place, path, image_id)) = write(name, tmp_path), EXPECTED[name]
    found = READERS[name](root)
    assert (found.name, found.classes, found.families) == (ARCHIVES[name].name, classes, families)
    assert [image.label for image in found.train] == train
    assert [image.label for image in found.test] == test
    assert found.train[place] == (root / path, train[place], image_id)
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


def test_images_of_cub_come_in_the_order_of_their_ids_and_families_are_last_words(cub: Path) -> None:
    found = READERS["cub"](cub)
    assert [image.image_id for image in (*found.train, *found.test)] == [7, 30, 2, 4]
    names = ("105.Whip_poor_Will", "091.Mockingbird", "Sparrow")
    assert [family(name) for name in names] == ["Will", "Mockingbird", "Sparrow"]


def test_lists_from_other_systems(cub: Path) -> None:
    expected = READERS["cub"](cub)
    for name in folders.CUB:  # byte order mark, Windows' line ends, blank lines at the end, spaces around
        text = folders.CUB[name].replace("\n", " \n") + "\n\n"
        (cub / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert READERS["cub"](cub) == expected


def test_files_may_be_in_other_places_and_labels_of_another_type(tmp_path: Path) -> None:
    aircraft, cars, dogs = (write(name, tmp_path) for name in ("aircraft", "cars", "dogs"))
    assert READERS["aircraft"](aircraft / "data") == READERS["aircraft"](aircraft)
    found = READERS["cars"](cars)
    (cars / "cars_test_annos_withlabels.mat").rename(cars / "devkit/cars_test_annos_withlabels.mat")
    assert READERS["cars"](cars) == found
    found = READERS["dogs"](dogs)
    (dogs / "train_list.mat").unlink()
    (dogs / "lists").mkdir()
    folders.write_dog_list(dogs / "lists/train_list.mat", dog_rows([5927, 16])[::-1], np.float64)
    again = READERS["dogs"](dogs)
    assert (again.classes, again.test, again.train[::-1]) == (found.classes, found.test, found.train)


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


DEMO = [PRESETS["demo"][name] for name in ("epochs", "lr", "frozen_epochs")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--dataset=dogs"], [50, 0.001, 12]), (["--dataset=dogs", "--preset=paper"], [50, 0.001, 12]),
     (["--dataset=dogs", "--epochs=7"], [7, 0.001, 12]), (["--dataset=dogs", "--preset=demo"], DEMO),
     *[([f"--dataset={name}"], [100, 0.01, 8]) for name in READERS if name != "dogs"], ([], [100, 0.01, 8])],
)  # fmt: skip
def test_recipes(flags: list[str], expected: list[float]) -> None:
    settings = parse(["--data", "folder", *flags])
    assert [settings.epochs, settings.lr, settings.frozen_epochs] == expected


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
