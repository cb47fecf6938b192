"""The paper's data sets are read from their official formats; what is wrong with a folder is named, and its source."""

import json
import os
import re
import shutil
from pathlib import Path

import dataset_folders as folders
import numpy as np
import pytest
from cub_runs import TINY
from dataset_folders import cells, dog_rows, draw, save_cars, save_dogs, write
from scipy.io import savemat

import check_images
import score
import train_cub
from workbench.datasets import ARCHIVES, READERS, open_data
from workbench.settings import PRESETS, parse, run_folder

META, TRAIN, TEST = "devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"
DOG_LIST = "train_list.mat"
ROWS = dog_rows(5927, 16)
BIRD = "images/0295/0000000221dc4d0cbfe14cae3c85c829.jpg"
# Of each: the classes, their families, the labels for training and testing, and one training image: its place, path,
# id, and what lists it.
EXPECTED = {
    "cub": (
        ["003.Sooty_Albatross", "020.Mockingbird"], ["Albatross", "Mockingbird"], [1, 0], [0, 1],
        (0, "images/020.Mockingbird/Auk 2.jpg", 7, "images.txt, line 3, '7 020.Mockingbird/Auk 2.jpg'"),
    ),
    "cars": (
        folders.CARS, ["AM", "Acura", "Acura"], [2, 0, 1, 0], [1, 1],
        (2, "cars_train/00003.jpg", "cars_train/00003.jpg", "devkit/cars_train_annos.mat, row 3, ('00003.jpg', 2)"),
    ),
    "aircraft": (
        list(folders.AIRCRAFT), list(folders.AIRCRAFT.values()), [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3],
        (1, "images/0034310.jpg", "0034310", "images_variant_trainval.txt, line 2, '0034310 F/A-18'"),
    ),
    "dogs": (
        folders.DOGS, [], [2, 1, 0, 2, 1, 0], [0, 1],
        (4, f"Images/{ROWS[1][0]}", ROWS[1][0], f"train_list.mat, row 5, ('{ROWS[1][0]}', 2.0)"),
    ),
    "nabirds": (
        ["Oldsquaw (Breeding male)", "Mallard (Female/Eclipse male)", "Oldsquaw (Female)"],
        ["Oldsquaw", "Mallard", "Oldsquaw"], [1, 0, 2], [1, 0, 2],
        (1, BIRD, "00000002-21dc-4d0c-bfe1-4cae3c85c829", "images.txt, line 5, '00000002-21dc-4d0c-bfe1"),
    ),
}  # fmt: skip
# Where else a list may be.
OTHER_PLACES = {"cars": (TEST, f"devkit/{TEST}"), "dogs": (DOG_LIST, f"lists/{DOG_LIST}")}


@pytest.mark.parametrize("name", READERS)
def test_official_folder_is_read(name, tmp_path, monkeypatch):
    root, (classes, families, train, test, (place, path, image_id, _)) = write(name, tmp_path), EXPECTED[name]
    found = READERS[name](root)
    assert (found.name, found.classes, found.families) == (ARCHIVES[name].name, classes, families)
    assert [image.label for image in found.train] == train
    assert [image.label for image in found.test] == test
    assert found.train[place] == (root / path, train[place], image_id)
    images = found.train + found.test
    assert all(image.path.is_file() for image in images)
    assert len({image.path for image in images}) == len({image.image_id for image in images}) == len(images)

    for given in (str(root), *root.parents[: len(ARCHIVES[name].folders)]):
        assert READERS[name](given) == found
    settings = parse(["--dataset", name, "--data", str(root)])
    assert open_data(settings) == found
    assert run_folder(settings).name == f"{root.name}-api-resnet101-seed0"
    monkeypatch.chdir(root)
    assert [root / image.path for image in READERS[name](Path(".")).train] == [image.path for image in found.train]
    if name in OTHER_PLACES:
        old, new = map(Path, OTHER_PLACES[name])
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
        assert READERS[name](root) == found


DEMO = [PRESETS["demo"][name] for name in ("epochs", "lr", "frozen_epochs")]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [(["--dataset=dogs"], [50, 0.001, 12]), (["--dataset=dogs", "--preset=paper"], [50, 0.001, 12]),
     (["--dataset=dogs", "--epochs=7"], [7, 0.001, 12]), (["--dataset=dogs", "--preset=demo"], DEMO),
     *[([f"--dataset={name}"], [100, 0.01, 8]) for name in READERS if name != "dogs"], ([], [100, 0.01, 8])],
)  # fmt: skip
def test_recipes(flags, expected):
    settings = parse(["--data", "folder", *flags])
    assert [settings.epochs, settings.lr, settings.frozen_epochs] == expected


def test_training_and_evaluating(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("aircraft", Path("."))
    result = train_cub.main([*TINY, "--dataset", "aircraft", "--data", "fgvc-aircraft-2013b", "--epochs", "1"])
    run = tmp_path / "runs/fgvc-aircraft-2013b-api-test_resnet-seed0"
    assert json.loads((run / "settings.json").read_text())["dataset"] == "aircraft"
    assert json.loads((run / "last/classes.json").read_text())["classes"] == list(folders.AIRCRAFT)
    assert result["images"] == 4
    found = score.main([str(run / "last"), "--device", "cpu"])
    assert found["test_top1"] == pytest.approx(result["test_top1"])


AIRCRAFT_LISTS = ("variants", "images_variant_trainval", "images_variant_test", "images_family_trainval")
REQUIRED = {
    "cub": list(folders.CUB),
    "cars": [META, TRAIN, TEST],
    "aircraft": [f"{name}.txt" for name in AIRCRAFT_LISTS],
    "dogs": [DOG_LIST, "test_list.mat"],
    "nabirds": list(folders.NABIRDS),
}


@pytest.mark.parametrize("name", READERS)
def test_missing_root_and_lists(name, tmp_path, capsys):
    archive, files = ARCHIVES[name], REQUIRED[name]
    expected = re.escape(
        f"; expected {archive.expected}, with {', '.join(files)} and {archive.images}. {archive.source}"
    )
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/nowhere is not a folder{expected}$"):
        READERS[name](tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} has no {', '.join(files)}{expected}$"):
        READERS[name](tmp_path)
    root = write(name, tmp_path)
    (root / files[-1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{root} has no {files[-1]}{expected}$"):
        READERS[name](root.parent if archive.folders else root)
    if name != "cub":  # only its like is embedded
        with pytest.raises(SystemExit):
            parse(["--dataset", name])
        assert f"--dataset {name} needs --data, {archive.expected}. {archive.source}" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("name", READERS)
def test_missing_images(tmp_path, name, part):
    root = write(name, tmp_path)
    path = getattr(READERS[name](root), part)[-1].path
    path.unlink()
    source = re.escape(ARCHIVES[name].source)
    with pytest.raises(FileNotFoundError) as caught:
        READERS[name](root)
    found = re.match(rf"(.*) lacks 1 image \((.*)\) of the \d in .*{source}$", str(caught.value))
    assert Path(found[1], found[2]) == path
    shutil.rmtree(found[1])
    with pytest.raises(FileNotFoundError, match=rf"^{found[1]} lacks (\d) images? \(.*\) of the \1 in .*{source}$"):
        READERS[name](root)


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in REQUIRED.items() for file in files])
def test_file_that_is_cut_or_something_else(tmp_path, name, file):
    root = write(name, tmp_path)
    path = root / file
    data, is_mat = path.read_bytes(), path.suffix == ".mat"
    cut = [data[: int(share * len(data))] for share in (0.1, 0.5, 0.9)] if is_mat else []
    for content in (b"", b"\n \n", b"<html>Not found</html>\n" * 20, *cut):
        path.write_bytes(content)
        about = " is empty, expected lines '<.* again$" if not is_mat and not content.strip() else ""
        with pytest.raises(ValueError, match=re.escape(str(path)) + (".* replace it$" if is_mat else about)):
            READERS[name](root)


# {data set: (list, text in it, what stands there instead, message), or (.mat file, what saves it, arguments, message)}
# What CUB-200-2011's lists hold, which are read and checked by the same code, isn't held for the others again.
DAMAGE = {
    "cub": [
        ("images", "4 020.Mockingbird/Auk_1.jpg", "4", "images.txt, line 4, '4': 1 of 2 columns; expected '<image_id>"),
        ("images", "30 003", "x 003", "images.txt, line 1, 'x 003.Sooty_Albatross/b.jpg': invalid literal"),
        ("image_class_labels", "7 20", "7 20 1", "image_class_labels.txt, line 2, '7 20 1': invalid literal"),
        ("train_test_split", "4 0", "4 01", "train_test_split.txt, line 2, '4 01': must be 0 or 1, not '01'"),
        ("images", "Sooty_Albatross/a", "Sooty/../../../a", "'2 003.Sooty/../../../a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "/tmp/a", "line 2, '2 /tmp/a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "..\\a", "line 2, '2 ..\\\\a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "C:\\a", "line 2, '2 C:\\\\a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a.jpg", ".", "line 2, '2 .': the path is empty"),
        ("images", "003.Sooty_Albatross/a", "a\0", "{}/images lacks 1 image (a\0.jpg) of the 4"),
        ("images", "30 003", "7 003", "images.txt, line 3, '7 020.Mockingbird/Auk 2.jpg': id 7 was in an earlier line"),
        ("image_class_labels", "7 20\n4 20\n", "", "2 image ids (4, 7) of {}/images.txt not in {}/image_class_labels"),
        ("image_class_labels", "7 20", "7 20\n8 20", "1 image id (8) of {}/image_class_labels.txt not in {}/images"),
        ("train_test_split", "4 0\n", "", "1 image id (4) of {}/images.txt not in {}/train_test_split.txt"),
        ("train_test_split", "4 0", "4 0\n5 0", "1 image id (5) of {}/train_test_split.txt not in {}/images.txt"),
        ("image_class_labels", "7 20", "7 21", "1 class id (21) of {}/image_class_labels.txt not in {}/classes.txt"),
        ("classes", "3 003", "3 003.Auk\n9 003", "1 class id (9) of {}/classes.txt not in {}/image_class_labels.txt"),
        ("train_test_split", "7 1", "7 0", "{}/train_test_split.txt has no training images for 1 class id (20); each"),
        ("images", "s/a.jpg", "s/A.jpg", "{}/images lacks 1 image (003.Sooty_Albatross/A.jpg) of the 4 in {}/images"),
    ],
    "nabirds": [
        ("classes", "22 Oldsquaw \n", "", "1 class id (22) of {}/hierarchy.txt not in {}/classes.txt"),
        ("train_test_split", "-4cae", "-5cae", "00000004-21dc-4d0c-bfe1-4cae3c85c829, ...) of {}/images.txt not in {}"),
        ("hierarchy", "295 22 \n", "", "1 class id (295) of {}/image_class_labels.txt not in {}/hierarchy.txt"),
    ],
    "aircraft": [
        ("images_variant_test", "F/A-18", "F-18", "1 variant (F-18) of {}/images_variant_test.txt not in {}/variants"),
        ("images_variant_test", "0034317", "0034309", "1 image id (0034309) of {}/images_variant_trainval.txt also in"),
        ("images_variant_trainval", "0034309", "0034317", "1 image id (0034317) of {}/images_variant_trainval.txt not"),
        ("variants", "F/A-18", "F/A-18\nF-19", "{}/images_variant_trainval.txt has no training images for 1 variant ("),
        ("images_family_trainval", "0034309 Boeing 707", "0034309 Boeing 7", ") into Boeing 7 and Boeing 707; unpack"),
    ],
    "cars": [
        (TRAIN, save_cars, [[0]], "row 1, ('00001.jpg', 0): class 0 is not one of 1 to 3; expected (fname, class)"),
        (TRAIN, save_cars, [[1, 4]], "row 2, ('00002.jpg', 4): class 4 is not one of 1 to 3"),
        (TRAIN, save_cars, [[1.5]], "must be a whole number, not 1.5"),
        (TRAIN, save_cars, [[np.nan]], "cannot convert float NaN"),
        (TRAIN, save_cars, [[np.inf]], "cannot convert float infinity"),
        (TRAIN, save_cars, [["1"]], "must be a whole number, not '1'"),
        (TRAIN, save_cars, [[1], [17]], "must be a path, not 17"),
        (TRAIN, save_cars, [[1, 1], ["1.jpg", "1.jpg"]], "id cars_train/1.jpg was in an earlier row"),
        (TRAIN, save_cars, [[1, 2]], "no training images for 1 class name (Acura TL Sedan 2012); each class of"),
        (TRAIN, savemat, [{"annotations": np.zeros((2, 3))}], "has no fname, class in 'annotations', only none;"),
        (TRAIN, savemat, [{"other": 1}], "has no fname, class in 'annotations', only other; replace it"),
        (TEST, savemat, [{"annotations": np.zeros(2, [("fname", "O")])}], "has no class in 'annotations', only fname;"),
        (META, savemat, [{"names": cells(folders.CARS)}], "has no class_names, only names; replace it"),
        (META, savemat, [{"class_names": cells(["Audi", 3])}], "row 2, (3,): must be a name, not 3"),
        (META, savemat, [{"class_names": cells(["Audi", " "])}], "row 2, (' ',): must be a name, not ' '"),
    ],
    "dogs": [
        (DOG_LIST, save_dogs, [[*ROWS[:5], (ROWS[5][0], 2)]], "class 2 was in n02086079-Pekinese before; expected"),
        (DOG_LIST, save_dogs, [[*ROWS[:5], (ROWS[5][0], 4)]], "n02113799-standard_poodle had class 3 before"),
        (DOG_LIST, save_dogs, [[*ROWS, dog_rows(199)[0]]], "_199.jpg) of {}/train_list.mat also in {}/test_list.mat"),
        (DOG_LIST, save_dogs, [ROWS[:1]], "has no training images for 1 class label (2); each class of {}/test"),
        (DOG_LIST, savemat, [{"file_list": cells(folders.DOGS), "labels": [1, 2]}], "have 3, 2 entries; replace it"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"), [(name, *case) for name, cases in DAMAGE.items() for case in cases]
)
def test_damaged_list(tmp_path, name, file, old, new, message):
    root = write(name, tmp_path)
    path = root / (file if callable(old) else f"{file}.txt")
    if callable(old):
        old(path, *new)
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.replace("{}", str(root)))) as caught:
        READERS[name](root)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("what", ["file", "folder", "relative", "dangling", "chain"])
def test_link_out_is_refused_with_path_and_line(name, what, tmp_path):
    root, outside = write(name, tmp_path), tmp_path / "nabirds of others"  # its name begins like that of a folder
    _, photo, _, place = EXPECTED[name][-1]
    photo = root / photo
    target = outside / ("nothing.jpg" if what == "dangling" else photo.name)
    draw(outside / photo.name)
    if what == "folder":
        shutil.rmtree(photo.parent)
        photo.parent.symlink_to(outside)
        target, place = outside, place.split(", ")[0]  # its first image is met first
    else:
        photo.unlink()
        (root / "hop").symlink_to(target)
        photo.symlink_to({"relative": os.path.relpath(target, photo.parent), "chain": root / "hop"}.get(what, target))
    link = re.escape(f"the path leaves {root} by a link, to {target}") + ".*; put the files there instead"
    for complete in (True, False):
        with pytest.raises(ValueError, match=re.escape(f"{root}/{place}") + f".*{link}"):
            READERS[name](root, complete=complete)
    with pytest.raises(SystemExit, match="the path leaves"):
        check_images.main([str(root), "--dataset", name, "--workers", "0", "--output", str(tmp_path / "list")])


@pytest.mark.parametrize("name", READERS)
def test_links_that_stay_inside_are_followed_and_circles_are_not(name, tmp_path):
    root = write(name, tmp_path)
    before = READERS[name](root)
    photo, elsewhere = root / EXPECTED[name][-1][1], root / "elsewhere.jpg"
    photo.rename(elsewhere)
    photo.symlink_to(elsewhere)
    for circle in ("one", "two"):  # a walk that follows links would go through 2 to the power of 40 folders here
        (photo.parent / circle).symlink_to(photo.parent)
    (tmp_path / "linked").symlink_to(root)  # the folder itself may be a link
    for given in (root, tmp_path / "linked"):
        found = READERS[name](given)
        assert [image.path.resolve().name for image in found.train].count("elsewhere.jpg") == 1
        assert [image.image_id for image in found.train] == [image.image_id for image in before.train]
