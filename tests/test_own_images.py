"""Reading of any folder or CSV of labelled images."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

FILE = Path(__file__).parents[1] / "examples/own_images/data.py"
SPEC = importlib.util.spec_from_file_location("own_images_data", FILE)  # examples/cub has a data.py as well
data = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(data)


@pytest.fixture
def folder(tmp_path):
    for label, (name, count) in enumerate({"blue": 8, "green": 4, "red": 12}.items()):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):
            colour = (80 * label, 10 * index, 50)
            Image.new("RGB", (32, 32), colour).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_split_is_stratified_disjoint_and_by_seed(folder):
    train, test = data.read(folder)
    assert Counter(item.label for item in test) == {"blue": 2, "green": 1, "red": 3}
    assert not set(train) & set(test)
    assert sorted(train + test) == data.read_folder(folder)
    assert data.read(folder) == (train, test) != data.read(folder, seed=1)


def test_csv_is_as_the_folder(folder):
    rows = [f"{item.label}/{item.path.name},{item.label}" for item in data.read_folder(folder)]
    (folder / "list.csv").write_text("\n".join(["path,label", *rows]))
    assert data.read(folder / "list.csv") == data.read(folder)


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_csv_cannot_leave_its_folder(folder, kind):
    outside = folder.parent / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (folder / "link.png").symlink_to(outside)
    path = {"up": "../outside.png", "absolute": str(outside), "link": "link.png"}[kind]
    (folder / "list.csv").write_text(f"path,label\nred/0.png,red\n{path},red\n")
    with pytest.raises(SystemExit, match=r"list.csv, line 3: .* leads out"):
        data.read(folder / "list.csv")


def test_warnings(folder):
    items = data.read_folder(folder)
    red, blue = [[item for item in items if item.label == name] for name in ("red", "blue")]
    found = data.warnings(red + blue[:1], red[:1])
    assert len(found) == 3
    assert "blue: one training image" in found[0]
    assert "12" in found[1]
    assert str(red[0].path) in found[2]
    assert data.warnings(red + blue[:6], blue[6:]) == []


def test_unreadable_files_give_their_path(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("text.jpg", "missing.jpg"):
        with pytest.raises(SystemExit, match=name):
            data.open_image(tmp_path / name)
