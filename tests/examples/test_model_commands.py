"""What is done with a model folder, whichever training wrote it: predictions, a page, ONNX, its card, a comparison."""

import csv
import json
import re
import shutil
import sys

import pytest
import torch
from colours import COLOURS, SHORT, prepared, probabilities
from cub_models import save_untrained
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

import app
import compare
import export_onnx
import predict
import score
import train_own
from workbench.model_card import make_card

COMMANDS = {"predict": predict.main, "export_onnx": export_onnx.main, "app": app.main, "score": score.main}


@pytest.fixture
def own(own_model):
    """A model of train_own.py, and the folder of its images."""
    return own_model, own_model.parent


@pytest.fixture(scope="module")
def cub_model(birds, tmp_path_factory):
    return save_untrained(birds, tmp_path_factory.mktemp("cub") / "last")


def cub_image(path):
    """As save_untrained has it: 40 x 40, of which 32 x 32 in the centre, with a normalisation of its own."""
    picture = to_tensor(center_crop(resize(Image.open(path), [40, 40]), [32, 32]))
    return normalize(picture, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1])


def test_predictions_are_those_of_the_net(own, cub_model, birds, capsys):
    path = own[1] / "test/blue/0.png"
    bird = min(birds.glob("images/*/*.jpg"))
    for model, file, expected in (
        (own[0], path, probabilities(own[0], prepared(own[0], path))),
        (cub_model, bird, probabilities(cub_model, cub_image(bird))),
    ):
        classes = json.loads((model / "classes.json").read_text())["classes"]
        assert predict.main([str(model), str(file), "--top", "99"]) == 0
        name, *found = capsys.readouterr().out.splitlines()[-1].split("  ")
        assert name == str(file)
        shown = dict(each.rsplit(" ", 1) for each in found)
        by_hand = dict(zip(classes, expected.tolist(), strict=True))
        assert {name: float(value) for name, value in shown.items()} == pytest.approx(by_hand, abs=1e-4)


def test_folders_are_predicted_in_batches_and_written_as_csv(own, tmp_path, capsys):
    model, images = own
    shutil.copytree(images / "test", tmp_path / "images")
    (tmp_path / "images/green/notes.txt").write_text("no image by its name")
    (tmp_path / "images/green/bad.png").write_text("no image by its content")
    (tmp_path / "images/green/._0.png").write_text("hidden")
    one = images / "train/red/0.png"
    file = tmp_path / "found.csv"
    arguments = [str(model), str(tmp_path / "images"), str(one), "--csv", str(file), "--top", "2"]
    assert predict.main([*arguments, "--batch-size", "4", "--workers", "1", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "bad.png (23 bytes) is not an image" in said
    assert "\n1 of 12 images cannot be decoded\n" in said
    rows = list(csv.DictReader(file.open(newline="")))
    assert list(rows[0]) == ["path", "predicted", "probability", "predicted_2", "probability_2"]
    paths = sorted((tmp_path / "images").rglob("[!.]*.png"))
    assert [row["path"] for row in rows] == [str(path) for path in [*paths, one] if path.name != "bad.png"]
    for row in rows:
        likely = probabilities(model, prepared(model, row["path"]))
        first, second = likely.argsort(descending=True)[:2].tolist()
        assert [row["predicted"], row["predicted_2"]] == [sorted(COLOURS)[first], sorted(COLOURS)[second]]
        assert float(row["probability"]) == pytest.approx(float(likely[first]), abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{model}", "nowhere.png"], "nowhere.png: no such file or folder"),
        (["predict", "{model}", "{empty}"], "no images .* in this folder"),
        (["predict", "{empty}", "{image}"], "not a model folder"),
        (["predict", "{damaged}", "{image}"], "the model cannot be read"),
        (["predict", "{model}", "{image}", "--device", "cuda:77"], "--device cuda:77 is not available"),
        (["predict", "{model}", "{image}", "--csv", "{empty}/no/found.csv"], "--csv .* cannot be written"),
        (["score", "{model}"], "no model folder of train_cub.py"),
        (["export_onnx", "{empty}"], "not a model folder"),
        (["export_onnx", "{model}", "--output", "{empty}/no/model.onnx"], "model.onnx cannot be written"),
    ],
)
def test_mistakes_are_one_line(own, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    shutil.copytree(own[0], tmp_path / "damaged")
    (tmp_path / "damaged/config.json").write_text("{")
    places = {"model": own[0], "image": own[1] / "test/blue/0.png"}
    places |= {name: tmp_path / name for name in ("empty", "damaged")}
    command, *others = arguments
    with pytest.raises(SystemExit, match=message) as ended:
        COMMANDS[command]([each.format(**places) for each in others])
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("kind", ["own", "cub"])
def test_onnx_file_is_enough_to_predict(own, cub_model, birds, tmp_path, capsys, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = own[0] if kind == "own" else cub_model
    export_onnx.main([str(model), "--output", str(tmp_path / "model.onnx")])
    difference = re.search(r"differ from the net's by at most (\S+)", capsys.readouterr().out)[1]
    assert float(difference) < 1e-4

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert about == json.loads((model / "classes.json").read_text())
    path = own[1] / "test/red/1.png" if kind == "own" else min(birds.glob("images/*/*.jpg"))
    image = create_transform(**about["transform"])(Image.open(path)) if kind == "own" else cub_image(path)
    (logits,) = session.run(["logits"], {"images": image[None].numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits)[0].softmax(0), probabilities(model, image), atol=1e-4, rtol=1e-3
    )


def test_page_gives_the_probabilities(own):
    pytest.importorskip("gradio")
    path = own[1] / "test/blue/0.png"
    page = app.make_page(own[0])
    by_hand = dict(zip(sorted(COLOURS), probabilities(own[0], prepared(own[0], path)).tolist(), strict=True))
    assert page.fn(str(path)) == pytest.approx(by_hand, abs=1e-4)
    assert page.fn(None) == {}


def test_page_without_gradio_says_what_to_install(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"pip install 'apinet-head\[app\]'"):
        app.main([str(own[0])])


def test_model_card_has_the_results(own):
    metrics = json.loads((own[0] / "metrics.json").read_text())
    card = ModelCard.load(own[0] / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {
        "accuracy": pytest.approx(metrics["accuracy"], abs=1e-4),
        "balanced_accuracy": pytest.approx(metrics["mean_class_accuracy"], abs=1e-4),
    }
    assert card.data.license is None  # it isn't ours to say
    (green,) = (row for row in metrics["by_class"] if row["class"] == "green")
    assert f"| green | 9 | 4 | {100 * green['accuracy']:.1f} % |" in card.text
    assert "27 training and 10 test images" in card.text
    low, high = (f"{100 * bound:.1f} %" for bound in metrics["accuracy_interval"])
    assert f"90.0 % of the 10 test images are right\n(95 % interval {low} to {high})" in card.text
    assert f"{100 * metrics['mean_class_accuracy']:.1f} % as the mean over the classes" in card.text
    assert "- `epochs`: 20\n" in card.text
    settings = metrics["settings"] | {"backbone_lr": 3e-4 / 10}
    assert "- `backbone_lr`: 3e-05\n" in make_card(metrics | {"settings": settings}).text


def test_cards_have_no_placeholders_and_numbers_as_one_writes_them(own, cub_model):
    for model in (own[0], cub_model):
        text = (model / "README.md").read_text()
        assert "More Information Needed" not in text
        assert not re.search(r"\d\.\d*(9999|0000)\d", text)
        assert ModelCard.load(model / "README.md").data.license is None


def test_card_says_how_to_load_the_model(own, capsys):
    model, images = own
    (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), flags=re.DOTALL)
    path = images / "test/blue/0.png"
    exec(code.replace("THIS_FOLDER", str(model)).replace("IMAGE", str(path)), {})
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == sorted(COLOURS)[int(probabilities(model, prepared(model, path)).argmax())]


def test_comparison_trains_all_methods_and_nothing_twice(own, tmp_path, monkeypatch):
    ran = []

    def run_here(command, check):  # a process of its own would be all start
        ran.append(command[4:])
        train_own.main(command[2:])

    monkeypatch.setattr(compare.subprocess, "run", run_here)
    command = [str(own[1]), "--out", str(tmp_path / "runs"), "--seeds", "1", "--against", "shuffled", "balanced"]
    command += SHORT
    for _ in range(2):
        compare.main(command)
    methods = ["shuffled", "balanced", "api"]
    assert [given[given.index("--baseline") + 1] if "--baseline" in given else "api" for given in ran] == methods
    assert [given[-2:] for given in ran] == [["--seed", "0"]] * 3
    runs = [json.loads((tmp_path / f"runs/{name}-seed0/metrics.json").read_text()) for name in methods]
    assert [run["settings"]["baseline"] for run in runs] == ["shuffled", "balanced", ""]
    rows = [line for line in (tmp_path / "runs/table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[1] for row in rows[2:]] == [f"{100 * run['accuracy']:.1f}" for run in runs]
    with pytest.raises(SystemExit, match="was trained with other flags"):
        compare.main([*command, "--lr", "0.1"])
