"""The report of a training: what it shows, and that it shows it for any number of classes and any names."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
import torch

from apinet_head import APINet, explain_pair
from workbench import report
from workbench.datasets.lists import Image
from workbench.images import ImageDataset, eval_transform
from workbench.metrics import by_class, summary
from workbench.model_folder import Model
from workbench.report import Confused, ConfusedPairs, Picture, picture, show_pairs

ODD = "<b>&\"'$\\no{$ | 猫\n</td><script>alert(1)</script>"
TRANSFORM = {"input_size": [3, 128, 128], "crop_pct": 1.0, "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}


def written(tmp_path, names, confusion, shown=ConfusedPairs([], "")):  # noqa: B008
    """The page, of which all that is opened is closed."""
    history = [{"epoch": 1, "loss": 2.0, "train_accuracy": 0.5}]
    metrics = summary(confusion) | {
        "by_class": by_class(names, [*range(len(names))] * 3, confusion), "classes": names,
        "confusion": confusion.tolist(), "minutes": 1.5, "machine": "a CPU",
        "history": [*history, {"epoch": 2, "loss": 1.0, "train_accuracy": 0.6, "test_accuracy": 0.7}],
        "data": {"name": names[0], "train": 9, "test": 9, "notes": [f"warning: {names[0]}"]},
        "settings": {"backbone": "test_resnet", "baseline": "", "backbone_lr": 3e-4 / 10},
    }  # fmt: skip
    report.write(tmp_path / "report.html", metrics, shown)
    text = (tmp_path / "report.html").read_text(encoding="utf-8").removeprefix("<!doctype html>")
    return ElementTree.fromstring(re.sub(r"<(meta|img|br|source)([^>]*)>", r"<\1\2/>", text))


def test_tables_have_the_counts(tmp_path):
    page = written(tmp_path, ["a", "b", "c"], torch.tensor([[3, 0, 0], [0, 3, 1], [2, 0, 1]]))
    rows = [[cell.text for cell in row if cell.text] for row in page.iter("tr")]
    assert [row[0] for row in rows if len(row) >= 5 and row[1].endswith("%")] == ["c", "b", "a"]  # worst first
    assert ["c", "33.3 %", "1", "3", "3", "a (2)"] in rows
    assert ["a", "3", "0", "0"] in rows
    assert ["b", "0", "3", "1"] in rows
    assert ["backbone_lr", "3e-05"] in rows  # not 2.9999999999999997e-05


@pytest.mark.parametrize("count", [2, 3, 31, 41, 200])
def test_any_number_of_classes_has_names_that_are_text_and_nothing_is_loaded(tmp_path, count):
    names, pixels = [ODD, *(f"{index}{ODD}" for index in range(1, count))], torch.rand(3, 20, 30)
    shown = ConfusedPairs([Confused(ODD, names[1], 2, 0, [Picture(pixels, pixels[0], ODD, ODD)])], ODD)
    page = written(tmp_path, names, torch.eye(count, dtype=torch.int64) + 1, shown)
    tags = [each.tag for each in page.iter()]
    assert tags.count("td") < 40 + 8 * count  # no table of count x count
    assert tags.count("picture") == (1 if count <= 30 else 2)
    assert not {"b", "script"} & {*tags}
    sources = [each.get(name, "data:image/") for each in page.iter() for name in ("src", "srcset", "href")]
    assert all(source.startswith("data:image/") for source in sources)
    assert ODD in page.itertext()
    assert "http" not in (tmp_path / "report.html").read_text(encoding="utf-8").split("base64")[0]


def test_heat_is_laid_over_the_picture():
    def decoded(heated):
        data = picture(Picture(torch.full((3, 224, 224), 0.5), heat, "", ""), heated).split("base64,")[1]
        image = PIL.Image.open(io.BytesIO(base64.b64decode(data)))
        return [*image.getpixel((100, 30)), *image.getpixel((100, 200))]

    heat = torch.zeros(224, 224)
    heat[:112] = 1
    assert decoded(False) == pytest.approx([128, 128, 128] * 2, abs=3)
    top_red, _, top_blue, bottom_red, _, bottom_blue = decoded(True)
    assert top_red > top_blue + 30  # turbo: dark red where there is heat
    assert bottom_blue >= bottom_red


@pytest.fixture
def images(tmp_path):
    """Training and test images of three classes, of noise on which nothing was learned: 0 to 3 of a, then b, then c."""
    torch.manual_seed(0)
    parts = [[Image(tmp_path / f"{part}-{'abc'[i // 4]}{i % 4}.png", i // 4, "") for i in range(12)] for part in (0, 1)]
    for item in parts[0] + parts[1]:
        PIL.Image.fromarray((torch.rand(128, 128, 3) * 255).byte().numpy()).save(item.path)
    return [ImageDataset(items, eval_transform(TRANSFORM)) for items in parts]


def shown_by(images, backbone="test_resnet", baseline=False):
    """The net, and what is shown of it where b and c are mistaken three times, a for b once."""
    likely = torch.full((12, 3), 0.2)
    likely[range(12), [0, 0, 1, 0, 2, 2, 1, 1, 2, 1, 2, 2]] = 0.6
    likely[5] = torch.tensor([0.05, 0.05, 0.9])  # the surest wrong one
    net = APINet(backbone, 3).eval()
    return net, show_pairs(Model(net, ["a", "b", "c"], TRANSFORM), *images, likely, baseline=baseline)


def assert_is_mean(heat, maps):
    mean = maps.mean(0)
    torch.testing.assert_close(heat, (mean - mean.min()) / (mean.max() - mean.min()))


def test_pairs_are_ranked_and_shown_with_their_training_images(images):
    (train, test), (net, shown) = images, shown_by(images)
    assert [pair[:4] for pair in shown.pairs] == [("b", "c", 2, 1), ("a", "b", 1, 0)]
    wrong, *others = shown.pairs[0].pictures
    assert wrong.file == "1-b1.png"
    captions = [picture.caption for picture in shown.pairs[0].pictures]
    assert captions == ["b, taken for c (90%)", "c, in training", "b, in training"]
    assert "a feature map of 4 x 4: each of its values stands for about 32 x 32 pixels" in shown.note

    # By hand: the most alike training images, and the maps of the gates.
    with torch.no_grad():
        features = net.backbone(torch.stack([test[5][0], *(train[row][0] for row in range(12))]))
    alike = torch.nn.functional.cosine_similarity(features[:1], features[1:])
    rows = [8 + int(alike[8:].argmax()), 4 + int(alike[4:8].argmax())]
    assert [other.file for other in others] == [train.images[row].path.name for row in rows]
    seen = [explain_pair(net, torch.stack([test[5][0], train[row][0]]), top_k=5) for row in rows]
    assert_is_mean(wrong.heat, seen[0].heatmaps[0])
    for other, maps in zip(others, seen, strict=True):
        assert_is_mean(other.heat, maps.heatmaps[1])
    raw = torch.from_numpy(np.asarray(PIL.Image.open(test.images[5].path)) / 255).permute(2, 0, 1)
    torch.testing.assert_close(wrong.pixels.double(), raw, atol=1e-5, rtol=0)


def test_baseline_is_shown_without_gates_and_only_the_first_pairs_have_pictures(images, monkeypatch):
    monkeypatch.setattr(report, "PAIRS", 1)
    (train, test), (net, shown) = images, shown_by(images, baseline=True)
    assert [len(pair.pictures) for pair in shown.pairs] == [3, 0]
    wrong, other, _ = shown.pairs[0].pictures
    row = [item.path.name for item in train.images].index(other.file)
    seen = explain_pair(net, torch.stack([test[5][0], train[row][0]]), top_k=5)
    assert_is_mean(wrong.heat, seen.plain_heatmaps[0])
    assert "the gates of the baseline are not trained" in shown.note


@pytest.mark.parametrize(
    ("backbone", "side", "note"),
    [
        ("test_resnet", 96, r"feature map is 3 x 3 for images of 96 x 96 .* train with images of 128 x 128 pixels or"),
        ("mobilenetv3_small_050", 128, "a layer after the map mixes channels"),
    ],
)
def test_no_heat_maps_of_coarse_maps_or_mixed_channels(images, backbone, side, note):
    for part in images:
        part.transform = eval_transform({**TRANSFORM, "input_size": [3, side, side]})
    _, shown = shown_by(images, backbone)
    assert re.match(f"There are no heat maps: .*{note}", shown.note)
    assert [each.heat for each in shown.pairs[0].pictures] == [None] * 3
