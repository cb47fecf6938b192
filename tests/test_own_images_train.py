"""Training on a folder of colours, from the command line to the report."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform

from apinet_head import APINet

SCRIPTS = Path(__file__).parents[1] / "examples/own_images"
COLOURS = {"blue": (20, 20, 200), "green": (20, 200, 20), "red": (200, 20, 20)}


def run(script, *args):
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model, and one of images whose test split has a red image in the folder of green ones."""
    root = tmp_path_factory.mktemp("colours")
    rng = random.Random(0)
    for part, count in {"train": 9, "test": 3}.items():
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                shade = tuple(value + rng.randint(-15, 15) for value in colour)
                Image.new("RGB", (40, 40), shade).save(root / part / name / f"{index}.png")
    Image.new("RGB", (40, 40), COLOURS["red"]).save(root / "test/green/wrong.png")
    flags = ["--backbone", "test_resnet", "--no-pretrained", "--image-size", "32", "--epochs", "8", "--lr", "0.003"]
    done = run("train.py", root, "--out", root / "model", *flags)
    assert done.returncode == 0, done.stderr
    return root / "model", root


def test_learns_and_tells_right_from_wrong(trained):
    model, root = trained
    net = APINet.from_pretrained(str(model)).eval()
    transform = create_transform(**json.loads((model / "classes.json").read_text())["transform"])
    counts = [[0] * 3 for _ in COLOURS]
    for label, name in enumerate(sorted(COLOURS)):
        for path in (root / "test" / name).iterdir():
            with torch.inference_mode():
                counts[label][int(net(transform(Image.open(path))[None]).argmax())] += 1
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["confusion"] == counts == [[3, 0, 0], [0, 3, 1], [0, 0, 3]]
    assert metrics["accuracy"] == 9 / 10


def test_report_has_the_counts_and_the_confused_pair(trained):
    page = (trained[0] / "report.html").read_text()
    rows = re.findall(r"<tr><th>(\w+)</th>(.*?)</tr>", page)
    assert {name: [int(n) for n in re.findall(r">(\d+)</td>", cells)] for name, cells in rows} == {
        "blue": [3, 0, 0],
        "green": [0, 3, 1],
        "red": [0, 0, 3],
    }
    assert "green, taken for red" in page
    assert page.count("data:image/png") == 4
    assert "<script" not in page


def test_predict_prints_what_the_net_gives(trained):
    model, root = trained
    path = root / "test/blue/0.png"
    transform = create_transform(**json.loads((model / "classes.json").read_text())["transform"])
    with torch.inference_mode():
        expected = APINet.from_pretrained(str(model)).eval()(transform(Image.open(path))[None])[0].softmax(0)
    shown = dict(re.findall(r"(blue|green|red) (\d\.\d+)", run("predict.py", model, path).stdout))
    assert {name: float(p) for name, p in shown.items()} == pytest.approx(
        dict(zip(sorted(COLOURS), expected.tolist(), strict=True)), abs=1e-4
    )


def test_predict_names_a_missing_file(trained):
    done = run("predict.py", trained[0], "nowhere.png")
    assert done.returncode != 0
    assert "nowhere.png: no such file" in done.stderr
    assert "Traceback" not in done.stderr
