"""workbench/datasets: wrong and partial folders give an error that names the file and where to get the data set."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_folders import CARS, CUB, NABIRDS, cells, dog_rows, write, write_annotations, write_dog_list
from scipy.io import savemat

from workbench.datasets import ARCHIVES, READERS
from workbench.datasets.lists import some

AIRCRAFT_LISTS = ("variants", "images_variant_trainval", "images_variant_test", "images_family_trainval")
REQUIRED = {
    "cub": list(CUB),
    "cars": ["devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"],
    "aircraft": [f"data/{name}.txt" for name in AIRCRAFT_LISTS],
    "dogs": ["train_list.mat", "test_list.mat"],
    "nabirds": list(NABIRDS),
}
FILES = [(name, file) for name, files in REQUIRED.items() for file in files]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_missing_list(tmp_path: Path, name: str, file: str) -> None:
    root, archive = write(name, tmp_path), ARCHIVES[name]
    (root / file).unlink()
    inside = root / "data" if name == "aircraft" else root
    message = f"{inside} has no {file.removeprefix('data/')}; expected {archive.expected}, with "
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}.*{re.escape(archive.source)}$"):
        READERS[name](root)


@pytest.mark.parametrize("name", READERS)
def test_missing_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder; expected .*https?://"):
        READERS[name](tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"; expected .*https?://") as caught:
        READERS[name](tmp_path)
    assert f"{tmp_path} has no {', '.join(file.removeprefix('data/') for file in REQUIRED[name])}" in str(caught.value)


def test_cars_without_test_labels(tmp_path: Path) -> None:
    root = write("cars", tmp_path)
    (root / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"cars_test_annos_withlabels\.mat, are a download of their own"):
        READERS["cars"](root)
    shutil.copy(root / "devkit/cars_test_annos.mat", root / "cars_test_annos_withlabels.mat")
    with pytest.raises(ValueError, match=r"withlabels\.mat has no class in 'annotations', only bbox_x1, .*fname"):
        READERS["cars"](root)


@pytest.mark.parametrize(
    ("name", "folder", "image"),
    [
        ("cub", "images", "003.Sooty_Albatross/a.jpg"),
        ("cars", "cars_train", "00003.jpg"),
        ("cars", "cars_test", "00002.jpg"),
        ("aircraft", "data/images", "0034309.jpg"),
        ("aircraft", "data/images", "0034320.jpg"),
        ("dogs", "Images", "n02086079-Pekinese/n02086079_16.jpg"),
        ("dogs", "Images", "n02086079-Pekinese/n02086079_199.jpg"),
        ("nabirds", "images", "0817/0000000121dc4d0cbfe14cae3c85c829.jpg"),
    ],
)
def test_missing_images(tmp_path: Path, name: str, folder: str, image: str) -> None:
    root, source = write(name, tmp_path), re.escape(ARCHIVES[name].source)
    (root / folder / image).unlink()
    one = rf"{root / folder} lacks 1 image \({re.escape(image)}\) of the \d in .*{source}"
    with pytest.raises(FileNotFoundError, match=one):
        READERS[name](root)
    shutil.rmtree(root / folder)
    every = rf"{root / folder} lacks (\d) images? \(.*\) of the \1 in .*{source}"
    with pytest.raises(FileNotFoundError, match=every):
        READERS[name](root)


@pytest.mark.parametrize(("name", "file"), FILES)
@pytest.mark.parametrize("content", [b"", b"\n \n", b"<html>Not found</html>\n" * 20])
def test_file_that_is_something_else(tmp_path: Path, name: str, file: str, content: bytes) -> None:
    root = write(name, tmp_path)
    (root / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(root / file))) as caught:
        READERS[name](root)
    if file.endswith(".txt") and not content.strip():
        assert re.search(r"\.txt is empty, expected lines '<.* again$", str(caught.value))


@pytest.mark.parametrize(("name", "file"), [case for case in FILES if case[1].endswith(".mat")])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_mat_file_cut_short(tmp_path: Path, name: str, file: str, share: float) -> None:
    root = write(name, tmp_path)
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=re.escape(f"{root / file}") + r".* replace it$"):
        READERS[name](root)


def test_of_many_that_are_missing_the_first_few_are_named() -> None:
    assert some("image", map(str, range(100, 110))) == "10 images (100, 101, 102, 103, 104, ...)"


# What CUB-200-2011's lists hold, which are read and checked by the same code, isn't held for NABirds' again.
DAMAGE = {
    "cub": [
        ("images", "4 020.Great_Auk/Auk_1.jpg", "4", "images.txt, line 4, '4': 1 of 2 columns; expected '<image_id>"),
        ("images", "30 003", "x 003", "images.txt, line 1, 'x 003.Sooty_Albatross/b.jpg': invalid literal"),
        ("image_class_labels", "7 20", "7 20 1", "image_class_labels.txt, line 2, '7 20 1': invalid literal"),
        ("image_class_labels", "7 20", "7 Auk", "image_class_labels.txt, line 2, '7 Auk': invalid literal"),
        ("classes", "3 003.Sooty_Albatross", "3", "classes.txt, line 2, '3': 1 of 2 columns"),
        ("train_test_split", "4 0", "4 2", "train_test_split.txt, line 2, '4 2': must be 0 or 1, not '2'"),
        ("train_test_split", "4 0", "4 01", "train_test_split.txt, line 2, '4 01': must be 0 or 1, not '01'"),
        ("images", "003.Sooty_Albatross/a", "../a", "images.txt, line 2, '2 ../a.jpg': the path leaves images/"),
        ("images", "Sooty_Albatross/a", "Sooty/../../../a", "'2 003.Sooty/../../../a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "/tmp/a", "line 2, '2 /tmp/a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "..\\a", "line 2, '2 ..\\\\a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a", "C:\\a", "line 2, '2 C:\\\\a.jpg': the path leaves images/"),
        ("images", "003.Sooty_Albatross/a.jpg", ".", "line 2, '2 .': the path is empty"),
        ("images", "003.Sooty_Albatross/a", "a\0", "{}/images lacks 1 image (a\0.jpg) of the 4"),
        ("images", "30 003", "7 003", "images.txt, line 3, '7 020.Great_Auk/Auk 2.jpg': id 7 was in an earlier line"),
        ("image_class_labels", "30 3", "7 3", "image_class_labels.txt, line 4, '7 3': id 7 was"),
        ("train_test_split", "2 0", "30 0", "train_test_split.txt, line 3, '30 0': id 30 was"),
        ("classes", "3 003", "20 003", "classes.txt, line 2, '20 003.Sooty_Albatross': id 20 was"),
        ("image_class_labels", "7 20\n4 20\n", "", "2 image ids (4, 7) of {}/images.txt not in {}/image_class_labels"),
        ("image_class_labels", "7 20", "7 20\n8 20", "1 image id (8) of {}/image_class_labels.txt not in {}/images"),
        ("train_test_split", "4 0\n", "", "1 image id (4) of {}/images.txt not in {}/train_test_split.txt"),
        ("train_test_split", "4 0", "4 0\n5 0", "1 image id (5) of {}/train_test_split.txt not in {}/images.txt"),
        ("images", "4 020.Great_Auk/Auk_1.jpg\n", "", "1 image id (4) of {}/image_class_labels.txt not in {}/images"),
        ("image_class_labels", "7 20", "7 21", "1 class id (21) of {}/image_class_labels.txt not in {}/classes.txt"),
        ("classes", "3 003", "3 003.Auk\n9 003", "1 class id (9) of {}/classes.txt not in {}/image_class_labels.txt"),
        ("train_test_split", "7 1", "7 0", "{}/train_test_split.txt has no training images for 1 class id (20)"),
        ("images", "s/a.jpg", "s/c.jpg", "{}/images lacks 1 image (003.Sooty_Albatross/c.jpg) of the 4 in {}/images"),
        ("images", "s/a.jpg", "s/A.jpg", "{}/images lacks 1 image (003.Sooty_Albatross/A.jpg) of the 4 in {}/images"),
        ("images", "Sooty_Albatross/a", "sooty_albatross/a", "{}/images lacks 1 image (003.sooty_albatross/a.jpg)"),
        ("images", "020.Great_Auk/", "021/", "{}/images lacks 2 images (021/Auk 2.jpg, 021/Auk_1.jpg) of the 4"),
    ],
    "nabirds": [
        ("images", "0295/", "../0295/", "the path leaves images/; expected '<image_id> <path under images/>'"),
        ("images", "00000003-", "00000002-", "id 00000002-21dc-4d0c-bfe1-4cae3c85c829 was in an earlier line"),
        ("train_test_split", "829 1", "829 0", "no training images for 3 class ids (295, 817, 900); each class of {}/"),
        ("classes", "22 Oldsquaw\n", "", "1 class id (22) of {}/hierarchy.txt not in {}/classes.txt"),
        ("hierarchy", "295 22\n", "", "1 class id (295) of {}/image_class_labels.txt not in {}/hierarchy.txt"),
        ("hierarchy", "295 22", "295", "hierarchy.txt, line 4, '295': 1 of 2 columns; expected '<class_id> <class_id"),
        ("hierarchy", "295 22", "295 22 1", "hierarchy.txt, line 4, '295 22 1': invalid literal for int"),
    ],
    "aircraft": [
        ("images_variant_test", "0034317 707-320", "0034317", "line 1, '0034317': 1 of 2 columns; expected '<image_i"),
        ("images_variant_test", "0034318", "0034317", "line 2, '0034317 F/A-18': id 0034317 was in an earlier line"),
        ("images_variant_test", "F/A-18", "F-18", "1 variant (F-18) of {}/images_variant_test.txt not in {}/variants"),
        ("images_variant_test", "0034317", "0034309", "1 image id (0034309) of {}/images_variant_trainval.txt also in"),
        ("images_variant_test", "0034317", "../../x", "the path leaves images/"),
        ("images_variant_trainval", "0034309", "0034317", "1 image id (0034317) of {}/images_variant_trainval.txt not"),
        ("images_variant_trainval", "Falcon 2000", "F/A-18", "{}/images_family_trainval.txt puts images of F/A-18 "),
        ("variants", "F/A-18", "F/A-18\nF-19", "{}/images_variant_trainval.txt has no training images for 1 variant ("),
        ("variants", "F/A-18\n", "", "1 variant (F/A-18) of {}/images_variant_trainval.txt not in {}/variants.txt"),
        ("variants", "F/A-18", "707-320", "variants.txt, line 2, '707-320': id 707-320 was in an earlier line"),
        ("images_family_trainval", "0034310 F/A-18\n", "", "1 image id (0034310) of {}/images_variant_trainval.txt n"),
        ("images_family_trainval", "0034309 Boeing 707", "0034309 Boeing 7", "into Boeing 7 and Boeing 707; unpack"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "message"), [(name, *case) for name, cases in DAMAGE.items() for case in cases]
)
def test_damaged_list(tmp_path: Path, name: str, file: str, old: str, new: str, message: str) -> None:
    root = write(name, tmp_path)
    folder = root / "data" if name == "aircraft" else root
    text = (folder / f"{file}.txt").read_text()
    assert old in text
    (folder / f"{file}.txt").write_text(text.replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.replace("{}", str(folder)))):
        READERS[name](root)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0], ["00001.jpg"], "row 1, ('00001.jpg', 0): class 0 is not one of 1 to 3; expected (fname, class)"),
        ([1, 4], ["00001.jpg", "00002.jpg"], "row 2, ('00002.jpg', 4): class 4 is not one of 1 to 3"),
        ([1.5], ["00001.jpg"], "must be a whole number, not 1.5"),
        ([np.nan], ["00001.jpg"], "cannot convert float NaN"),
        ([np.inf], ["00001.jpg"], "cannot convert float infinity"),
        (["1"], ["00001.jpg"], "must be a whole number, not '1'"),
        ([1], ["../cars_test/00001.jpg"], "the path leaves cars_train/"),
        ([1], [17], "must be a path, not 17"),
        ([1, 1], ["00001.jpg", "00001.jpg"], "id cars_train/00001.jpg was in an earlier row"),
        ([1, 2], ["00001.jpg", "00002.jpg"], "no training images for 1 class name (Acura TL Sedan 2012); each class"),
    ],
)
def test_damaged_car_list(tmp_path: Path, labels: list[Any], names: list[Any], message: str) -> None:
    root = write("cars", tmp_path)
    file = root / "devkit/cars_train_annos.mat"
    write_annotations(file, labels, names)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}.*{re.escape(message)}"):
        READERS["cars"](root)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta", {"names": cells(CARS)}, "cars_meta.mat has no class_names, only names; replace it"),
        ("meta", {"class_names": cells(["Audi", 3])}, "cars_meta.mat, row 2, (3,): must be a name, not 3"),
        ("meta", {"class_names": cells(["Audi", " "])}, "cars_meta.mat, row 2, (' ',): must be a name, not ' '"),
        ("meta", {"class_names": cells(["A", "A"])}, "cars_meta.mat, row 2, ('A',): id A was in an earlier row"),
        ("meta", {"class_names": cells([])}, "cars_meta.mat is empty, expected rows (class_names)"),
        ("train_annos", {"annotations": np.zeros((2, 3))}, "has no fname, class in 'annotations', only none"),
        ("train_annos", {"other": 1}, "has no fname, class in 'annotations', only other"),
    ],
)
def test_mat_file_with_other_content(tmp_path: Path, file: str, content: dict[str, Any], message: str) -> None:
    root = write("cars", tmp_path)
    savemat(root / f"devkit/cars_{file}.mat", content)
    with pytest.raises(ValueError, match=re.escape(message)):
        READERS["cars"](root)


ROWS = dog_rows([5927, 16])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:5], (ROWS[5][0], 2)], r"row 6, .* class 2 was in n02086079-Pekinese before; expected \(file_list, la"),
        ([*ROWS[:5], (ROWS[5][0], 4)], "row 6, .* n02113799-standard_poodle had class 3 before"),
        ([*ROWS, ROWS[0]], "row 7, .* id n02085620-Chihuahua/n02085620_5927.jpg was in an earlier row"),
        ([*ROWS, dog_rows([199])[0]], r"1 image \(n02085620-Chihuahua/n02085620_199.jpg\) of .*train_list.mat also in"),
        ([ROWS[0]], r"train_list.mat has no training images for 1 class label \(2\); each class of .*test_list.mat"),
        ([("../" + ROWS[0][0], 1)], "row 1, .* the path leaves Images/"),
        ([(3, 1)], "row 1, .* must be a path, not 3"),
    ],
)
def test_damaged_dog_list(tmp_path: Path, rows: list[tuple[Any, Any]], message: str) -> None:
    root = write("dogs", tmp_path)
    write_dog_list(root / "train_list.mat", rows)
    with pytest.raises(ValueError, match=message):
        READERS["dogs"](root)


def test_dog_list_with_too_few_labels(tmp_path: Path) -> None:
    root = write("dogs", tmp_path)
    savemat(root / "test_list.mat", {"file_list": cells([name for name, _ in ROWS]), "labels": np.ones((4, 1))})
    with pytest.raises(ValueError, match=r"test_list\.mat: file_list, labels have 6, 4 entries; replace it"):
        READERS["dogs"](root)
