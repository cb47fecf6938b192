"""workbench/datasets: what a list calls an image stays in the data set's folder; circles of links hang nothing."""

import os
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
from dataset_folders import draw
from dataset_folders import dog_rows, write

import check_images
from workbench.datasets import READERS
from workbench.datasets.bird_lists import read_cub

PHOTOS = {
    "cub": ("images/020.Great_Auk/Auk 2.jpg", "images.txt, line 3, '7 020.Great_Auk/Auk 2.jpg'"),
    "cars": ("cars_train/00003.jpg", "devkit/cars_train_annos.mat, row 3, ('00003.jpg', 2)"),
    "aircraft": ("data/images/0034310.jpg", "data/images_variant_trainval.txt, line 2, '0034310 F/A-18'"),
    "dogs": (f"Images/{dog_rows([16])[1][0]}", f"train_list.mat, row 5, ('{dog_rows([16])[1][0]}', 2)"),
    "nabirds": ("images/0295/0000000221dc4d0cbfe14cae3c85c829.jpg", "images.txt, line 3, '00000002-21dc-4d0c-bfe1"),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file next to the data set's folder, whose name begins like the folder's."""
    path = tmp_path / "nabirds of others"
    path.mkdir()
    PIL.Image.fromarray(PIXELS).save(path / "secret.jpg")
    return path


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("what", ["file", "folder", "relative", "dangling", "chain"])
def test_link_out_is_refused_with_path_and_line(name: str, what: str, outside: Path, tmp_path: Path) -> None:
    root = write(name, tmp_path)
    inside, line = PHOTOS[name]
    photo = root / inside
    target = outside / "secret.jpg"
    if what == "folder":
        target = outside / photo.name
        shutil.copy(photo, target)
        shutil.rmtree(photo.parent)
        photo.parent.symlink_to(outside)
    else:
        photo.unlink()
        if what == "dangling":
            target = outside / "nothing.jpg"
        if what == "chain":
            (root / "hop").symlink_to(target)
        photo.symlink_to({"relative": os.path.relpath(target, photo.parent), "chain": root / "hop"}.get(what, target))
    base = root / "data" if name == "aircraft" else root
    place = line if what != "folder" else line.split(", ")[0]
    for complete in (True, False):
        with pytest.raises(ValueError, match=re.escape(f"{root}/{place}")) as caught:
            READERS[name](root, complete=complete)
        reason = f"the path leaves {base} by a link, to {target}; put the files there instead"
        assert reason in str(caught.value) or what == "folder"
        assert f"the path leaves {base} by a link, to {outside}/" in str(caught.value)
    with pytest.raises(SystemExit, match="the path leaves"):
        check_images.main([str(root), "--dataset", name, "--workers", "0", "--output", str(tmp_path / "list")])


@pytest.mark.parametrize("name", READERS)
def test_links_that_stay_inside_are_followed(name: str, tmp_path: Path) -> None:
    root = write(name, tmp_path)
    before = READERS[name](root)
    photo = root / PHOTOS[name][0]
    elsewhere = (root / "data" if name == "aircraft" else root) / "elsewhere.jpg"
    photo.rename(elsewhere)
    photo.symlink_to(elsewhere)
    (tmp_path / "linked").symlink_to(root)  # the folder itself may be a link
    for given in (root, tmp_path / "linked"):
        found = READERS[name](given)
        assert [image.path.resolve().name for image in found.train].count("elsewhere.jpg") == 1
        assert [image.image_id for image in found.train] == [image.image_id for image in before.train]


def test_circles_of_folders(cub: Path, tmp_path: Path) -> None:
    """A walk that follows links would go through 2 to the power of 40 folders here."""
    for name in ("one", "two"):
        (cub / "images" / name).symlink_to(cub / "images")
        (cub / "images/020.Great_Auk" / name).symlink_to("..")
    assert len(read_cub(cub).train) == 2
    (cub / "images/003.Sooty_Albatross").rename(tmp_path / "away")
    (cub / "images/003.Sooty_Albatross").symlink_to("003.Sooty_Albatross")
    with pytest.raises(FileNotFoundError, match=r"lacks 2 images \(003\.Sooty_Albatross/a\.jpg, 003"):
        read_cub(cub)
    bad = check_images.main([str(cub), "--workers", "0", "--output", str(tmp_path / "list")])
    assert [path.name for path, _ in bad] == ["b.jpg", "a.jpg"]
    assert all("Too many levels of symbolic links" in reason for _, reason in bad)
