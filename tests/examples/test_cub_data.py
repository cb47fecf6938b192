"""workbench/datasets: the official folder is read right, and every damage to it is named."""

import os
import re
from pathlib import Path

import pytest
from cub_folder import LISTS, PATHS

from workbench.datasets.bird_lists import family, read_cub


@pytest.mark.parametrize("at", ["folder", "parent", "text", "relative"])
def test_read_cub(cub: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cub)
    given = {"folder": cub, "parent": cub.parent, "text": str(cub), "relative": Path(".")}[at]
    images = (Path("images") if at == "relative" else cub / "images").joinpath
    dataset = read_cub(given)
    assert dataset.name == "CUB-200-2011"
    assert dataset.classes == ["003.Sooty_Albatross", "020.Great_Auk"]
    assert dataset.train == [(images(PATHS["7"]), 1, 7), (images(PATHS["30"]), 0, 30)]
    assert dataset.test == [(images(PATHS["2"]), 0, 2), (images(PATHS["4"]), 1, 4)]
    assert all(image.path.is_file() for image in dataset.train + dataset.test)


def test_lists_from_other_systems(cub: Path) -> None:
    expected = read_cub(cub)
    for name in LISTS:  # byte order mark, Windows' line ends, blank lines at the end, spaces around
        text = LISTS[name].replace("\n", " \n") + "\n\n"
        (cub / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert read_cub(cub) == expected


def test_file_name_that_is_not_utf8(cub: Path) -> None:
    name = os.fsdecode(b"003.Sooty_Albatross/\xe9.jpg")
    try:
        (cub / "images" / PATHS["2"]).rename(cub / "images" / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    (cub / "images.txt").write_bytes(LISTS["images.txt"].encode().replace(b"s/a.jpg", b"s/\xe9.jpg"))
    assert read_cub(cub).test[0].path == cub / "images" / name


def test_class_folder_may_be_a_link(cub: Path) -> None:
    (cub / "images/020.Great_Auk").rename(cub / "elsewhere")
    (cub / "images/020.Great_Auk").symlink_to(cub / "elsewhere")
    assert len(read_cub(cub).train) == 2


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_list(cub: Path, name: str, text: str) -> None:
    (cub / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is empty, expected lines '<.* anew"):
        read_cub(cub)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images.txt", "4 020.Great_Auk/Auk_1.jpg", "4",
         "images.txt, line 4, '4': 1 of 2 columns; expected '<image_id>"),
        ("images.txt", "30 003", "x 003", "images.txt, line 1, 'x 003.Sooty_Albatross/b.jpg': invalid literal"),
        ("image_class_labels.txt", "7 20", "7 20 1", "image_class_labels.txt, line 2, '7 20 1': invalid literal"),
        ("image_class_labels.txt", "7 20", "7 Auk", "image_class_labels.txt, line 2, '7 Auk': invalid literal"),
        ("classes.txt", "3 003.Sooty_Albatross", "3", "classes.txt, line 2, '3': 1 of 2 columns"),
        ("train_test_split.txt", "4 0", "4 2", "train_test_split.txt, line 2, '4 2': must be 0 or 1, not '2'"),
        ("train_test_split.txt", "4 0", "4 01", "train_test_split.txt, line 2, '4 01': must be 0 or 1, not '01'"),
        ("images.txt", "003.Sooty_Albatross/a", "../a", "images.txt, line 2, '2 ../a.jpg': the path leaves images/"),
        ("images.txt", "Sooty_Albatross/a", "Sooty/../../../a",
         "line 2, '2 003.Sooty/../../../a.jpg': the path leaves"),
        ("images.txt", "003.Sooty_Albatross/a", "/tmp/a", "line 2, '2 /tmp/a.jpg': the path leaves images/"),
        ("images.txt", "003.Sooty_Albatross/a", "..\\a", "line 2, '2 ..\\\\a.jpg': the path leaves images/"),
        ("images.txt", "003.Sooty_Albatross/a", "C:\\a", "line 2, '2 C:\\\\a.jpg': the path leaves images/"),
        ("images.txt", "30 003", "7 003",
         "images.txt, line 3, '7 020.Great_Auk/Auk 2.jpg': id 7 was in an earlier line"),
        ("image_class_labels.txt", "30 3", "7 3", "image_class_labels.txt, line 4, '7 3': id 7 was"),
        ("train_test_split.txt", "2 0", "30 0", "train_test_split.txt, line 3, '30 0': id 30 was"),
        ("classes.txt", "3 003", "20 003", "classes.txt, line 2, '20 003.Sooty_Albatross': id 20 was"),
        ("image_class_labels.txt", "7 20\n4 20\n", "",
         "2 image ids (4, 7) of {}/images.txt not in {}/image_class_labels"),
        ("image_class_labels.txt", "7 20", "7 20\n8 20",
         "1 image id (8) of {}/image_class_labels.txt not in {}/images"),
        ("train_test_split.txt", "4 0\n", "", "1 image id (4) of {}/images.txt not in {}/train_test_split.txt"),
        ("train_test_split.txt", "4 0", "4 0\n5 0", "1 image id (5) of {}/train_test_split.txt not in {}/images.txt"),
        ("images.txt", "4 020.Great_Auk/Auk_1.jpg\n", "",
         "1 image id (4) of {}/image_class_labels.txt not in {}/images"),
        ("image_class_labels.txt", "7 20", "7 21",
         "1 class id (21) of {}/image_class_labels.txt not in {}/classes.txt"),
        ("classes.txt", "3 003", "3 003.Auk\n9 003",
         "1 class id (9) of {}/classes.txt not in {}/image_class_labels.txt"),
        ("train_test_split.txt", "7 1", "7 0", "{}/train_test_split.txt has no training images for 1 class id (20)"),
        ("images.txt", "s/a.jpg", "s/c.jpg",
         "{}/images lacks 1 image (003.Sooty_Albatross/c.jpg) of the 4 in {}/images"),
        ("images.txt", "s/a.jpg", "s/A.jpg",
         "{}/images lacks 1 image (003.Sooty_Albatross/A.jpg) of the 4 in {}/images"),
        ("images.txt", "Sooty_Albatross/a", "sooty_albatross/a", "{}/images lacks 1 image (003.sooty_albatross/a.jpg)"),
        ("images.txt", "020.Great_Auk/", "021/", "{}/images lacks 2 images (021/Auk 2.jpg, 021/Auk_1.jpg) of the 4"),
    ],
)  # fmt: skip
def test_damaged_list(cub: Path, name: str, old: str, new: str, message: str) -> None:
    assert old in LISTS[name]
    (cub / name).write_text(LISTS[name].replace(old, new))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.replace("{}", str(cub)))):
        read_cub(cub)


def test_missing_images_folder_shows_the_first_few(cub: Path) -> None:
    more = range(100, 110)
    (cub / "images.txt").write_text("".join(f"{i} {i}/x.jpg\n" for i in more))
    (cub / "image_class_labels.txt").write_text("".join(f"{i} 3\n" for i in more))
    (cub / "train_test_split.txt").write_text("".join(f"{i} 1\n" for i in more))
    (cub / "classes.txt").write_text("3 003.Sooty_Albatross\n")
    (cub / "images").rename(cub / "pictures")
    shown = "lacks 10 images (100/x.jpg, 101/x.jpg, 102/x.jpg, 103/x.jpg, 104/x.jpg, ...) of the 10 in"
    with pytest.raises(FileNotFoundError, match=re.escape(shown)):
        read_cub(cub)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("001.Black_footed_Albatross", "Albatross"),
        ("105.Whip_poor_Will", "Will"),
        ("091.Mockingbird", "Mockingbird"),
        ("Sparrow", "Sparrow"),
    ],
)
def test_family(name: str, expected: str) -> None:
    assert family(name) == expected
