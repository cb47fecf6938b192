"""What is done with a model folder, whichever training wrote it: predictions, a page, ONNX, its card, a comparison."""

import csv
import json
import re
import shutil
import sys

import pytest
import torch
from colours import COLOURS, SHORT, prepared, probabilities
from cub_runs import save_untrained
from huggingface_hub import ModelCard
from PIL import Image
from torchvision.transforms.functional import center_crop, normalize, resize, to_tensor

import app
import compare
import export_onnx
import predict
import score
import train_own
from workbench.model_card import make_card


@pytest.fixture(params=["own", "cub"])
def case(request, own_model, birds, tmp_path_factory):
    """A model folder of either training, an image, and what the net takes for it."""
    if request.param == "own":
        path = own_model.parent / "test/blue/0.png"
        return own_model, path, prepared(own_model, path)
    path = min(birds.glob("images/*/*.jpg"))
    # As save_untrained has it: 40 x 40, of which 32 x 32 in the centre, with a normalisation of its own.
    picture = to_tensor(center_crop(resize(Image.open(path), [40, 40]), [32, 32]))
    model = save_untrained(birds, tmp_path_factory.mktemp("cub") / "last")
    return model, path, normalize(picture, [0.5, 0.4, 0.3], [0.3, 0.2, 0.1])


def test_predictions_are_those_of_the_net(case, capsys):
    model, path, image = case
    assert predict.main([str(model), str(path), "--top", "99"]) == 0
    name, *found = capsys.readouterr().out.splitlines()[-1].split("  ")
    assert name == str(path)
    shown = {name: float(value) for name, value in (each.rsplit(" ", 1) for each in found)}
    classes = json.loads((model / "classes.json").read_text())["classes"]
    assert shown == pytest.approx(dict(zip(classes, probabilities(model, image).tolist(), strict=True)), abs=1e-4)


def test_onnx_file_is_enough_to_predict(case, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, _, image = case
    export_onnx.main([str(model), "--output", str(tmp_path / "model.onnx")])
    difference = re.search(r"differ from the net's by at most (\S+)", capsys.readouterr().out)[1]
    assert float(difference) < 1e-4

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    assert about == json.loads((model / "classes.json").read_text())
    (logits,) = session.run(["logits"], {"images": image[None].numpy()})
    found = torch.from_numpy(logits)[0].softmax(0)
    torch.testing.assert_close(found, probabilities(model, image), atol=1e-4, rtol=1e-3)


def test_folders_are_predicted_in_batches_and_written_as_csv(own_model, tmp_path, capsys):
    folder = shutil.copytree(own_model.parent / "test", tmp_path / "images")
    (folder / "green/notes.txt").write_text("no image by its name")
    (folder / "green/bad.png").write_text("no image by its content")
    (folder / "green/._0.png").write_text("hidden")
    one, file = own_model.parent / "train/red/0.png", tmp_path / "found.csv"
    flags = ["--csv", str(file), "--top", "2", "--batch-size", "4", "--workers", "1", "--device", "cpu"]
    assert predict.main([str(own_model), str(folder), str(one), *flags]) == 1
    said = capsys.readouterr().err
    assert "bad.png (23 bytes) is not an image" in said
    assert "\n1 of 12 images cannot be decoded\n" in said
    rows = list(csv.DictReader(file.open(newline="")))
    assert list(rows[0]) == ["path", "predicted", "probability", "predicted_2", "probability_2"]
    paths = [*sorted(folder.rglob("[!.]*.png")), one]
    assert [row["path"] for row in rows] == [str(path) for path in paths if path.name != "bad.png"]
    for row in rows:
        likely = probabilities(own_model, prepared(own_model, row["path"]))
        first, second = likely.argsort(descending=True)[:2].tolist()
        assert [row["predicted"], row["predicted_2"]] == [sorted(COLOURS)[first], sorted(COLOURS)[second]]
        assert float(row["probability"]) == pytest.approx(float(likely[first]), abs=1e-3)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (predict, ["{model}", "nowhere.png"], "nowhere.png: no such file or folder"),
        (predict, ["{model}", "{empty}"], "no images .* in this folder"),
        (predict, ["{empty}", "{image}"], "not a model folder"),
        (predict, ["{model}", "{image}", "--device", "cuda:77"], "--device cuda:77 is not available"),
        (predict, ["{model}", "{image}", "--csv", "{empty}/no/found.csv"], "--csv .* cannot be written"),
        (score, ["{model}"], "no model folder of train_cub.py"),
        (export_onnx, ["{empty}"], "not a model folder"),
        (export_onnx, ["{model}", "--output", "{empty}/no/model.onnx"], "model.onnx cannot be written"),
        (app, ["{model}"], r"pip install '\.\[app\]'"),
    ],
)
def test_mistakes_are_one_line(own_model, tmp_path, monkeypatch, command, arguments, message):
    places = {"model": own_model, "image": own_model.parent / "test/blue/0.png", "empty": tmp_path}
    monkeypatch.setitem(sys.modules, "gradio", None)  # which the page needs
    with pytest.raises(SystemExit, match=message) as ended:
        command.main([each.format(**places) for each in arguments])
    assert "\n" not in str(ended.value)


def test_page_gives_the_probabilities(own_model):
    pytest.importorskip("gradio")
    path = own_model.parent / "test/blue/0.png"
    page = app.make_page(own_model)
    by_hand = dict(zip(sorted(COLOURS), probabilities(own_model, prepared(own_model, path)).tolist(), strict=True))
    assert page.fn(str(path)) == pytest.approx(by_hand, abs=1e-4)
    assert page.fn(None) == {}


def test_model_card_has_the_results_and_says_how_to_load_the_model(own_model, capsys):
    metrics = json.loads((own_model / "metrics.json").read_text())
    card = ModelCard.load(own_model / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    figures = {"accuracy": metrics["accuracy"], "balanced_accuracy": metrics["mean_class_accuracy"]}
    assert found == pytest.approx(figures, abs=1e-4)
    (green,) = (row for row in metrics["by_class"] if row["class"] == "green")
    low, high = (f"{100 * bound:.1f} %" for bound in metrics["accuracy_interval"])
    for part in (
        f"| green | 9 | 4 | {100 * green['accuracy']:.1f} % |",
        "27 training and 10 test images",
        f"90.0 % of the 10 test images are right\n(95 % interval {low} to {high})",
        f"{100 * metrics['mean_class_accuracy']:.1f} % as the mean over the classes",
        "- `epochs`: 20\n",
    ):
        assert part in card.text
    settings = metrics["settings"] | {"backbone_lr": 3e-4 / 10}
    assert "- `backbone_lr`: 3e-05\n" in make_card(metrics | {"settings": settings}).text

    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    path = own_model.parent / "test/blue/0.png"
    exec(code.replace("THIS_FOLDER", str(own_model)).replace("IMAGE", str(path)), {})
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == sorted(COLOURS)[int(probabilities(own_model, prepared(own_model, path)).argmax())]


def test_cards_have_no_placeholders_and_numbers_as_one_writes_them(case):
    text = (case[0] / "README.md").read_text()
    assert "More Information Needed" not in text
    assert not re.search(r"\d\.\d*(9999|0000)\d", text)
    assert ModelCard.load(case[0] / "README.md").data.license is None  # it isn't ours to say


def test_comparison_trains_all_methods_and_nothing_twice(own_model, tmp_path, monkeypatch):
    ran = []

    def run_here(command, check):  # a process of its own would be all start
        ran.append(command[4:])
        train_own.main(command[2:])

    monkeypatch.setattr(compare.subprocess, "run", run_here)
    command = [str(own_model.parent), "--out", str(tmp_path), "--seeds", "1", "--against", "shuffled", "balanced"]
    for _ in range(2):
        compare.main([*command, *SHORT])
    methods = ["shuffled", "balanced", "api"]
    assert [given[given.index("--baseline") + 1] if "--baseline" in given else "api" for given in ran] == methods
    assert [given[-2:] for given in ran] == [["--seed", "0"]] * 3
    runs = {name: json.loads((tmp_path / f"{name}-seed0/metrics.json").read_text()) for name in methods}
    assert [run["settings"]["baseline"] for run in runs.values()] == ["shuffled", "balanced", ""]
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[1] for row in rows[2:]] == [f"{100 * run['accuracy']:.1f}" for run in runs.values()]
    with pytest.raises(SystemExit, match="was trained with other flags"):
        compare.main([*command, *SHORT, "--lr", "0.1"])

    # Of several seeds.
    shares = {"balanced": (0.5, 0.7), "shuffled": (0.4, 0.4), "api": (0.6, 0.6)}
    same = {"history": [{"train_accuracy": 0.9}]}
    text = compare.table(
        {m: [runs[m] | same | {"accuracy": x, "mean_class_accuracy": x / 2} for x in shares[m]] for m in shares}
    )
    assert "| Cross-entropy, the same balanced batches | 60.0 ± 14.1 | 30.0 ± 7.1 | 90.0 ± 0.0 |" in text
    assert re.search(r"less cross-entropy, the same .* accuracy 0\.0 ± 14\.1 \(by seed: \+10\.0, -10\.0\)", text)
    assert re.search(r"less cross-entropy, shuffled .* accuracy 20\.0 ± 0\.0 \(by seed: \+20\.0, \+20\.0\)", text)
    assert "test_resnet from scratch, 32 x 32 pixels" in text
