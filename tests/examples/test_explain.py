"""What the gates see, as users of the CUB example run it, and the pointing game's arithmetic on made-up maps."""

import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from cub_runs import save_untrained
from PIL import Image as Picture
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

import explain
import pointing_game
from apinet_head import APINet
from birds.dataset import write_birds
from workbench import model_folder
from workbench.compared import BirdMarks, Outcome, run_tests
from workbench.datasets.bird_lists import read_cub
from workbench.datasets.lists import ImageSet
from workbench.settings import parse


@pytest.fixture(scope="module")
def model(birds, tmp_path_factory):
    """The model folder of a net that has learnt nothing."""
    return save_untrained(birds, tmp_path_factory.mktemp("runs") / "untrained" / "last")


def test_there_is_a_picture_per_pair_and_a_report_that_stands_alone_and_names_what_it_shows(birds, model):
    explained = explain.main([str(model), "--pairs", "3", "--device", "cpu"])
    assert explained == model.parent / "explain"
    assert {path.name for path in explained.iterdir()} == {"pair01.png", "pair02.png", "pair03.png", "report.html"}
    with Picture.open(explained / "pair02.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 600
    text = (explained / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r'base64,[^"]*', "", text))
    sources = re.findall(r'src="([^"]*)"', text)
    assert [source.startswith("data:image/jpeg;base64,") for source in sources] == [True] * 3
    assert len(text) < 2_000_000
    names = [explain.readable(name) for name in read_cub(birds).classes]
    cell = '<td class="name">(.*?)</td>'
    rows = re.findall(f'<tr>{cell}{cell}\\s*<td class="name (.*?)">(.*?)</td>\\s*<td>(.*?) %</td></tr>', text)
    assert len(rows) == 6
    for file, true, kind, predicted, percent in rows:
        assert true.replace(" ", "_") in file
        assert {true, predicted} <= set(names)
        assert kind == ("right" if true == predicted else "wrong")
        assert 100 / 6 <= float(percent) <= 100
    assert "Circles: the visible parts" in text


def test_chosen_images(birds, model, tmp_path):
    images = sorted(birds.glob("images/*/*.jpg"))
    stranger = tmp_path / "<stranger>.jpg"
    stranger.write_bytes(images[0].read_bytes())
    pairs = ["--pair", str(images[0]), str(images[7]), "--pair", str(stranger), str(images[-1])]
    output = explain.main([str(model), *pairs, "--output", str(tmp_path / "out"), "--device", "cpu", "--top-k", "2"])
    assert len(list(output.glob("*.png"))) == 2
    text = (output / "report.html").read_text()
    assert images[7].name in text
    assert '&lt;stranger&gt;.jpg</td><td class="name">unknown' in text
    assert "Two species of one family" in text

    own = tmp_path / "own"
    shutil.copytree(model, own, ignore=shutil.ignore_patterns("run.json"))  # as train_own.py writes it: without data
    output = explain.main([str(own), *pairs[:3], "--output", str(tmp_path / "out")])
    assert "White Barred Tern" in (output / "report.html").read_text()  # by the name of the folder
    (tmp_path / "text.jpg").write_text("no image")
    for arguments, message in (
        ([own, "--pair", images[0], tmp_path / "text.jpg"], r"text\.jpg .* is not an image"),
        ([own], r"is not from train_cub.*--pair takes any two images"),
        ([model, "--pair", images[0], tmp_path / "none.jpg"], r"none\.jpg is not a file"),
        ([model, *pairs[:3], "--top-k", "97"], "--top-k must be from 1 to the 96 channels of the features, got 97"),
        ([model, "--pairs", "0"], "2"),
    ):
        with pytest.raises(SystemExit, match=message):
            explain.main([*map(str, arguments)])


def test_images_are_shown_as_they_are_and_an_outcome_is_what_the_net_makes_of_each(birds, model):
    outcome, net = run_tests(model, None, torch.device("cpu")), APINet.from_pretrained(model).eval()
    images = read_cub(birds).test
    raws = [to_tensor(center_crop(resize(Picture.open(image.path), [40, 40]), [32, 32])) for image in images]
    for image, raw, features, logits, label in zip(images, raws, *outcome[3:], strict=True):
        with torch.no_grad():
            expected = net.backbone(normalize(raw, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1])[None])
            torch.testing.assert_close(features[None], expected, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(logits[None], net.head(expected), atol=1e-4, rtol=1e-3)
        assert label == image.label
    shown = explain.make_pair(model_folder.load(model), (images[0], images[1]), 2, [], None)
    torch.testing.assert_close(shown.pixels, torch.stack(raws[:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("command", [explain, pointing_game])
def test_mistakes_are_one_line(birds, model, tmp_path, command):
    coarse = save_untrained(birds, tmp_path / "run" / "last", "--backbone-args", "{}", "--crop", "40")
    others = write_birds(tmp_path / "birds", species=4, images_per_species=2, size=40, workers=0, progress=False)
    for arguments, message in (
        ([coarse], r"2 x 2 for images of 40 x 40 pixels, too coarse .* 80 x 80 .* output_stride"),
        ([model, "--device", "cuda:99"], "--device cuda:99 is not available"),
        ([model.parent], "not a model folder"),
        ([model, "--data", others], r"CUB-200-2011 has other classes than .* give its --data"),
        ([model, "--data", model], "images.txt"),
        ([model, "--output", model / "run.json" / "new.json"], "--output .* cannot be written"),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            command.main([*map(str, arguments)])
        assert "\n" not in str(ended.value)


def test_only_the_embedded_birds_have_marks(birds, model, tmp_path):
    photographs = tmp_path / "CUB_200_2011"
    shutil.copytree(birds, photographs, ignore=shutil.ignore_patterns("birds.json"))
    flags = ["--data", str(photographs), "--device", "cpu"]
    with pytest.raises(SystemExit, match="only the embedded birds have annotations"):
        pointing_game.main([str(model), *flags])
    output = explain.main([str(model), *flags, "--pairs", "1", "--output", str(tmp_path / "out")])
    assert "Circles" not in (output / "report.html").read_text()


def test_hardest_pairs_are_the_surest_errors_of_different_classes_each_with_the_nearest_of_the_wrong_class():
    likely = torch.tensor(
        # true 0: right; sure of 1; less sure of 1. true 1: right; sure of 3, of which there is no image.
        [[0.8, 0.1, 0.1, 0], [0.05, 0.9, 0.05, 0], [0.2, 0.7, 0.1, 0], [0.1, 0.8, 0.1, 0], [0.05, 0.02, 0, 0.93],
         [0.6, 0.1, 0.3, 0]]  # true 2: sure of 0, but less so
    )  # fmt: skip
    labels, features = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0.0, 5.0, 8.0, 4.0, 9.0, 0.5])[:, None]
    outcome = Outcome(None, None, ImageSet("made up", [*"0123"], [], []), features, likely.log(), labels)
    assert explain.hardest_pairs(outcome, 2) == [(1, 3), (5, 0)]
    assert explain.hardest_pairs(outcome, 3) == [(1, 3), (5, 0), (2, 4)]


def test_peak_is_the_pixels_middle_x_first_and_a_hit_within_the_radius_of_any_target():
    maps = torch.zeros(3, 20, 30)
    maps[0, 4, 24] = maps[1, 4, 12] = 3  # the third has no peak
    where = pointing_game.peaks(maps)
    assert where[:2].tolist() == [[24.5, 4.5], [12.5, 4.5]]
    assert where[2].isnan().all()
    flat = torch.zeros(6, 9)
    flat[:2, 7:] = 1  # the border of an enlarged map
    assert pointing_game.peaks(flat).tolist() == [8, 1]
    for targets, expected in (
        ([(24.5, 7.0)], [True, False, False]),
        ([(4.5, 24.5)], [False] * 3),  # x and y swapped
        ([(24.5, 8.0)], [False] * 3),
        ([(0.0, 0.0), (12.5, 2.0)], [False, True, False]),
    ):
        assert pointing_game.hits(where, targets, 3).tolist() == expected
    assert pointing_game.measures(torch.tensor([False, True, False, False])) == {"first": 0, "any": 1, "share": 0.25}


def test_chance_by_area_agrees_with_throwing():
    region, radius = (2.0, 10.0, 42.0, 30.0), 6.0
    disc = pointing_game.chance([(20.0, 20.0)], radius, region)
    assert disc == pytest.approx(math.pi * radius**2 / (40 * 20), rel=0.01)
    targets = [(5.0, 12.0), (9.0, 14.0), (60.0, 20.0)]  # overlapping, cut off, outside
    thrown = np.random.default_rng(0).uniform([2, 10], [42, 30], (200_000, 2))
    inside = (np.linalg.norm(thrown[:, None] - np.array(targets), axis=2) <= radius).any(1)
    assert pointing_game.chance(targets, radius, region) == pytest.approx(inside.mean(), abs=0.004)


def test_summary_averages_runs_image_by_image_with_intervals_as_the_normal_ones():
    def run(values):
        hits, misses = (
            dict.fromkeys(pointing_game.MEASURES, np.array([*values, math.nan]) * share) for share in (1, 0)
        )
        return {"gates": hits, **dict.fromkeys(("plain", "random", "box", "image"), misses)}

    values = np.random.default_rng(1).random(400) < 0.3
    found, mean = pointing_game.summary([run(values), run(0 * values)]), values.mean() / 2
    half = 1.96 * math.sqrt(mean * (0.5 - mean) / 400)
    expected = {"mean": 100 * mean, "low": 100 * (mean - half), "high": 100 * (mean + half)}
    assert found["gates"]["first"] == found["gates - plain"]["any"] == pytest.approx(expected, abs=0.25)


def test_marks_lie_on_the_crop_as_the_transform_cuts_it(birds):
    data = read_cub(birds)
    marks = BirdMarks(data, {"squash": 40, "crop": 32})
    first, sibling = (next(i for i in data.test if i.label == label) for label in (0, 1))
    x, y, width, height = marks.boxes[first.image_id]
    expected = [side * 40 / 60 - 4 for side in (x, y, x + width, y + height)]
    assert marks.box(first) == pytest.approx(expected)
    assert marks.differing(first, first) == []
    marks.parts = {i: dict.fromkeys(parts, (30.0, 45.0)) | {"bar": (30.0, 45.0), "crown": (2.0, 1.0)}
                   for i, parts in marks.parts.items()}  # fmt: skip
    assert marks.differing(first, sibling) == [pytest.approx((16, 26))]  # Terns differ in bar and crown: one is cut off


def test_families_are_not_mixed(birds):
    data = read_cub(birds)
    labels = torch.tensor([image.label for image in data.test])
    features = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0))
    partners = labels[pointing_game.partners(Outcome(None, None, data, features, None, labels))]
    assert (partners != labels).all()
    assert [data.families[label] for label in partners] == [data.families[label] for label in labels]


def test_pointing_game_writes_figures_and_table(birds, model, tmp_path, capsys):
    found = pointing_game.main([str(model), "--output", str(tmp_path / "new" / "game.json"), "--device", "cpu"])
    assert json.loads((tmp_path / "new" / "game.json").read_text()) == found
    run = found["methods"]["api"]["runs"][0]
    assert run["map"] == [4, 4]
    assert run["images"] + run["left_out"] == 18
    assert run["images"] > 9
    assert "--backbone test_resnet" in run["command"]
    assert str(birds) not in json.dumps(found)
    for row in ("gates", "plain", "random", "box", "image"):
        for cell in found["methods"]["api"]["summary"][row].values():
            assert 0 <= cell["low"] <= cell["mean"] <= cell["high"] <= 100
    table = (tmp_path / "new" / "game.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert "| chance: anywhere in the box |" in table
    assert "feature map 4 x 4" in table


def test_commands_of_the_pointing_game_give_the_same_settings():
    settings = parse(["--preset", "demo", "--pretrained", "--no-cache-images", "--lr", "0.5", "--backbone", "test_vit"])
    command = shlex.split(pointing_game.train_command(settings))
    assert command[:2] == ["python", "examples/train_cub.py"]
    assert parse(command[2:]) == settings
