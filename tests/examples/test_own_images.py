"""Reading of any folder or CSV of labelled images, what is chosen from it, and the figures of the results."""

import codecs
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from colours import SHORT
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix

import train_own
from solar_cells import write_folders
from workbench.datasets import folders
from workbench.defaults import Known, choose
from workbench.metrics import by_class, confusions, ranked_pairs, summary


def write(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, len(name), 0)).save(root / name, compress_level=0)  # all of one length


@pytest.fixture
def folder(tmp_path):
    sizes = {"blue": 8, "green": 4, "red": 12}
    write(tmp_path / "images", *(f"{name}/{index}.png" for name in sizes for index in range(sizes[name])))
    return tmp_path / "images"


def counts(items):
    return dict(Counter(item.label for item in items))


def test_split_is_disjoint_and_by_share_and_seed(folder):
    train, test, notes = folders.read(folder, 0.5)
    assert counts(test) == {"blue": 4, "green": 2, "red": 6}
    assert sorted(train + test) == folders.read_folder(folder)
    assert folders.read(folder, 0.5) == (train, test, notes)
    assert folders.read(folder, 0.5, seed=1).test != test


@pytest.mark.parametrize(
    ("names", "train", "test", "note"),
    [
        # The folders of a split, in any case, with classes of one spelling.
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "test/dog/1.jpg"],
         {"cat": 1, "dog": 1}, {"dog": 1}, "val is not used"),
        *(([f"{part}/{name}/1.jpg" for part, name in ((a, "cat"), (a, "Dog "), (b, "Cat"), (b, "Dog "))],
           {"cat": 1, "Dog": 1}, {"cat": 1, "Dog": 1}, "cat is spelt in several ways: 'Cat', 'cat'")
          for a, b in (("Train", "Test"), ("TRAIN", "Val"), ("training", "testing"))),
        # Without test images, those in train/ are split, and "train" is no class; with images in it, it is one.
        ([f"train/{name}/{index}.png" for name, count in (("bus", 8), ("car", 4)) for index in range(count)],
         {"bus": 6, "car": 3}, {"bus": 2, "car": 1}, "25% of each class"),
        ([f"{name}/{index}.png" for name in ("bus", "train") for index in range(4)],
         {"bus": 3, "train": 3}, {"bus": 1, "train": 1}, "25% of each class"),
    ],
)  # fmt: skip
def test_folders_of_a_split_are_taken_and_others_split(tmp_path, names, train, test, note):
    write(tmp_path, *names)
    found = folders.read(tmp_path)
    assert (counts(found.train), counts(found.test)) == (train, test)
    assert any(note in each for each in found.notes)


def test_what_is_no_image_by_its_name_is_ignored_and_a_bad_image_ends_the_command_or_is_left_out(folder, capsys):
    before = folders.read_folder(folder)
    write(folder, ".ipynb_checkpoints/copy.png", "red/._0.png", "__MACOSX/0.png", "red/.thumbs/0.png")
    (folder / "red/notes.txt").write_text("of the photographer")
    assert folders.read_folder(folder) == before
    (folder / "red/broken.jpg").write_text("no image")
    split = folders.read(folder)
    assert any("1 file ignored" in note and "notes.txt" in note for note in split.notes)
    with pytest.raises(SystemExit, match=r"^1 bad image: .*--skip-bad"):
        folders.sound(split, 0, skip_bad=False)
    assert "broken.jpg (8 bytes) is not an image" in capsys.readouterr().out
    left = folders.sound(split, 0, skip_bad=True)
    assert sorted(left.train + left.test) == before
    assert left.notes[-1] == "left out: 1 bad image"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_with_a_split_as_excel_writes_it(folder, encoding, delimiter):
    rows = ["Label, PATH ,split", "Drossel grün,red/0.png,Train", f"Zaunkönig,{folder}/red/1.png,train"]
    text = "\r\n".join([*rows, "zaunkönig,red/2.png, val", "Zaunkönig ,red/3.png,test"]).replace(",", delimiter)
    content = codecs.BOM_UTF16_LE + text.encode("utf-16-le") if "bom" in encoding else text.encode(encoding)
    (folder / "list.csv").write_bytes(content)
    *parts, notes = folders.read(folder / "list.csv")
    train, test = ([(item.path.name, item.label) for item in part] for part in parts)
    assert train == [("0.png", "Drossel grün"), ("1.png", "Zaunkönig")]
    assert test == [("2.png", "Zaunkönig"), ("3.png", "Zaunkönig")]
    assert notes.pop() == "the class Zaunkönig is spelt in several ways: 'Zaunkönig', 'zaunkönig'"
    assert [("read as Windows-1252" in note) for note in notes] == [True] * (encoding == "cp1252")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        # Names of images in a folder.
        (["cat/1.png", "cat/2.png"], "two classes or more are needed, got cat$"),
        (["cat/1.png", "dog/1.png"], "no class has two images, one to train with and one to test$"),
        (["train/cat/1.png", "train/dog/1.png", "test/cow/1.png"], "no training images of the test classes cow$"),
        (["Test/cat/1.png", "val/cat/1.png"], "one folder of training images is needed, train/; it has Test, val$"),
        (["Train/cat/1.png", "training/cat/1.png", "test/cat/1.png"], "is needed, train/; it has Train, training$"),
        (["1.png"], r"no images in folders of classes, as in \S+image.jpg$"),
        ([], "no such folder or CSV file$"),
        # What is in a CSV.
        (b"", "the first line must name the columns path and label"),
        (b"path,label\n", "no rows"),
        (b"path,label\nred/0.png\n", "line 2: a path and a label are needed"),
        (b"path,label\nred/99.png,red\n", "line 2: red/99.png: no such file"),
        ("path,label\nred/0.png,red\n".encode("utf-16-le"), "save it as UTF-8"),
        (b"path,label,split\nred/0.png,red,test\n", "no training images"),
        (b"path,label,split\nred/0.png,red,holdout\n", "line 2: the split must be train or test, got 'holdout'"),
        (b'path,label\n"' + b"a" * 200_000, r"line \d: field larger than field limit"),
        (b"path,label\nred/0.png,red\n../outside.png,red\n", r"list.csv, line 3: .* leads out"),
        (b"path,label\nFOLDER/../outside.png,red\n", r"list.csv, line 2: .* leads out"),
        (b"path,label\nlink.png,red\n", r"list.csv, line 2: .* leads out"),
    ],
)
def test_images_that_cannot_be_trained_on_end_the_command_with_one_line(tmp_path, given, message):
    source = tmp_path / "images"
    if isinstance(given, bytes):
        write(source, "red/0.png", "../outside.png")
        (source / "link.png").symlink_to(tmp_path / "outside.png")
        given, source = given.replace(b"FOLDER", bytes(source)), source / "list.csv"
        source.write_bytes(given)
    else:
        write(source, *given)
    with pytest.raises(SystemExit, match=message) as ended:
        train_own.main([str(source), "--out", str(tmp_path / "model"), *SHORT])
    assert "\n" not in str(ended.value)


def test_warnings(folder):
    red, blue = [[item for item in folders.read_folder(folder) if item.label == name] for name in ("red", "blue")]
    found = folders.warnings(red + blue[:1], red[:1])
    said = ["blue: only one training image", "blue: no test image", "12", str(red[0].path)]
    assert [part in warning for part, warning in zip(said, found, strict=True)] == [True] * 4
    assert folders.warnings(red[2:] + blue[:6], red[:2] + blue[6:]) == []
    assert folders.warnings(red, red[:6])[-1] == "the same holds for 1 more test image: the accuracy will be too good"
    red[0].path.write_bytes(red[0].path.read_bytes() + bytes(9999))  # no other is as long
    (found,) = folders.warnings(red + blue, red[:1])[1:]
    assert found == f"{red[0].path} of the test images is the training image {red[0].path}"
    blue[0].path.write_bytes(red[3].path.read_bytes())
    assert folders.warnings(red + blue, [])[1:] == ["under two labels or more, as under blue and red: 1 image"]


def test_short_side_is_the_median(tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (50, 40, 200)]
    for path, size in zip(paths, [(50, 90), (100, 40), (300, 200)], strict=True):
        Image.new("RGB", size).save(path)
    assert folders.short_side(paths) == 50


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, {"backbone": "resnet18", "image_size": 224, "n_classes": 8, "n_samples": 4, "epochs": 91, "lr": 3e-4}),
        ({"classes": 2}, {"n_classes": 2, "n_samples": 16, "epochs": 91}),
        ({"classes": 2, "typical": 6}, {"n_samples": 6}),
        ({"classes": 2, "typical": 2}, {"n_samples": 4}),
        ({"images": 60}, {"epochs": 100}),
        ({"images": 50_000, "classes": 200}, {"backbone": "resnet18", "n_classes": 16, "n_samples": 4, "epochs": 10}),
        ({"images": 50_000, "gpu": True}, {"backbone": "resnet50"}),
        ({"side": 40}, {"image_size": 64}),
        ({"side": 97}, {"image_size": 128}),
        ({"pretrained": False}, {"lr": 1e-3}),
        ({"frozen": True}, {"backbone": "resnet18", "image_size": 224, "n_samples": 4, "epochs": 18, "lr": 0.01}),
        ({"frozen": True, "images": 1600, "classes": 20, "typical": 80}, {"n_samples": 4, "epochs": 10}),
    ],
)
def test_defaults(known, expected):
    plain = {"images": 704, "classes": 30, "typical": 20, "side": 500, "pretrained": True, "gpu": False}
    found = choose(Known(**{**plain, **known}))
    assert {name: found[name][0] for name in expected} == expected
    assert all(reason for _, reason in found.values())


@pytest.mark.filterwarnings("ignore:y_pred contains classes")  # "d" has no images
def test_confusions_and_their_figures_are_those_of_scikit_learn():
    rng, names = random.Random(0), ["a", "b", "c", "d"]
    labels = [0] * 7 + [1] * 20 + [2] * 3
    predicted = [rng.choice([label, label, *range(4)]) for label in labels]
    confusion = confusions(labels, predicted, 4)
    assert confusion.tolist() == confusion_matrix(labels, predicted, labels=range(4)).tolist()
    found = summary(confusion)
    share = accuracy_score(labels, predicted)
    assert found["accuracy"] == share
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["largest_class_share"] == 20 / 30
    # Wilson's: from its bounds, the share is 1.96 standard deviations away.
    bounds = np.roots([30 + 1.96**2, -60 * share - 1.96**2, 30 * share**2])
    assert found["accuracy_interval"] == pytest.approx(sorted(bounds), rel=1e-4)

    rows = by_class(names, [0, 0, 1], confusion)
    assert [row["accuracy"] for row in rows[:3]] == sorted(row["accuracy"] for row in rows[:3])
    assert rows[3] | {"class": "d", "accuracy": None, "train_images": 0} == rows[3]
    wrong = confusion.clone().fill_diagonal_(0)
    for row in rows[:3]:
        others = wrong[names.index(row["class"])]
        assert row["taken_for_count"] == others.max()
        assert row["taken_for"] is None or others[names.index(row["taken_for"])] == others.max()


def test_pairs_are_ranked_by_both_directions():
    confusion = torch.tensor([[9, 3, 0, 1], [4, 3, 0, 0], [5, 0, 8, 0], [0, 0, 0, 2]])
    assert ranked_pairs(confusion) == [(1, 0, 4, 3), (2, 0, 5, 0), (0, 3, 1, 0)]
    assert ranked_pairs(torch.eye(3, dtype=torch.int64)) == []


def test_solar_cells_are_sorted_by_kind_and_degree(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 9, 9), np.uint8)
    kinds, probabilities = ["mono"] * 2 + ["poly"] * 3, [0.0, 1 / 3, 0.6667, 1.0, 1.0]
    by_degree = ["mono-functional", "mono-possibly-defective", "poly-probably-defective", *["poly-defective"] * 2]
    for degrees, names in ((False, ["mono-functional"] * 2 + ["poly-defective"] * 3), (True, by_degree)):
        root = tmp_path / str(degrees)
        found = write_folders(root, images, probabilities, kinds, degrees)
        assert found == Counter(names) == counts(folders.read_folder(root))
        for number, (name, image) in enumerate(zip(names, images, strict=True), 1):
            assert np.array_equal(np.asarray(Image.open(root / name / f"cell{number:04d}.png")), image)
    with pytest.raises(ValueError, match=r"must be 0, 1/3, 2/3 or 1, got 0.5"):
        write_folders(tmp_path, images[:1], [0.5], ["mono"])


def test_readme_has_the_figures_of_the_results():
    folder = Path(__file__).parents[2] / "examples/results"
    found = (folder / "solar_cells.md").read_text()
    text = (folder / "README.md").read_text().partition("## Tried on photographs")[2]
    rows = re.findall(r"^\| (Baseline|API-Net) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    assert len(rows) == 2
    assert all(" | ".join(row) in found for row in rows)
    (gain,) = re.findall(r"With five seeds there is no clear difference: (\S+ ± \S+) points", text)
    assert f"test accuracy {gain} " in found
