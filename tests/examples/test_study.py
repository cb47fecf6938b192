"""The study, from the command line to its tables, and its statistics."""

import json

import numpy as np
import pytest
import timm
import torch
from colours import write_colours
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

import study
from workbench import study_tables

TINY = ["--steps", "20", "--seeds", "2", "--image-size", "32"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study of colours, and its command."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    source = f"colours={write_colours(folder / 'colours')}"
    command = [source, "--weights", f"test_resnet={folder / 'weights.pth'}", "--out", str(folder / "out"), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(study, "CHOOSING", study.CHOOSING[:2])
        study.main(command)
        yield folder / "out", command


def rows_of(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_every_method_is_chosen_on_validation_images_and_tested_with_the_same_seeds(finished):
    rows = rows_of(finished[0])
    for method in study.METHODS:
        of_method = [row for row in rows if row["method"] == method]
        chosen = [row for row in of_method if row["part"] == "validation"]
        rates = sorted({row["lr"] for row in chosen})
        assert sorted((row["lr"], row["seed"]) for row in chosen) == [(lr, s) for lr in rates for s in study.CHOOSING]
        tested = [row for row in of_method if row["part"] == "test"]
        assert [row["seed"] for row in tested] == [0, 1]
        means = {lr: np.mean([row["accuracy"] for row in chosen if row["lr"] == lr]) for lr in rates}
        best = max(rates, key=means.get)
        assert {row["lr"] for row in tested} == {best}
        place = study.RATES.index(best)  # the rates beside it were tried
        assert set(study.RATES[max(0, place - 1) : place + 2]) <= set(rates)


def test_a_finished_study_trains_nothing_and_one_that_was_stopped_only_the_rest(finished, monkeypatch):
    folder, command = finished
    trained, execute = [], study.execute
    monkeypatch.setattr(study, "execute", lambda run, *args: trained.append(run) or execute(run, *args))
    before = (folder / "runs.jsonl").read_bytes()
    study.main(command)
    assert not trained
    assert (folder / "runs.jsonl").read_bytes() == before

    lines = before.decode().splitlines(keepends=True)
    (folder / "runs.jsonl").write_text("".join(lines[:-2]) + lines[-2][:50])  # stopped in the midst of a line
    study.main(command)
    assert len(trained) == 2
    again, first = rows_of(folder)[-2:], [json.loads(line) for line in lines[-2:]]
    for row, was in zip(again, first, strict=True):
        assert {**row, "seconds": 0} == {**was, "seconds": 0}


def test_tables_and_plot_are_written_from_the_runs_alone(finished):
    folder, _ = finished
    (folder / "study.md").unlink()
    study.main(["--out", str(folder)])
    text = (folder / "study.md").read_text()
    assert "| colours | test_resnet, 32 px, frozen | API-Net |" in text
    assert f"torch {torch.__version__}" in text
    assert (folder / "study.png").stat().st_size > 1000
    assert len((folder / "study.csv").read_text().splitlines()) == 1 + len(rows_of(folder))


def test_varied_settings_never_see_a_test_image(finished, monkeypatch):
    folder, command = finished
    before = len(rows_of(folder))
    monkeypatch.setattr(study, "CHOOSING", study.CHOOSING[:1])
    study.main([*command, "--vary", "--methods", "api"])
    new = rows_of(folder)[before:]
    assert {row["part"] for row in new} == {"validation"}
    assert {row["rank_weight"] for row in new} == {0.0, 1.0, 3.0}


def test_settings_can_be_varied_by_name():
    run = study.Run("d", "b", 0, True, "api", "test", 0, 0.01, 200, 2, 16)
    assert [each.frozen_steps for each in study.variants(run, ["frozen_steps"])] == [20, 100]
    assert {each.margin for each in study.variants(run, ["margin"])} == {0.0, 0.2, 0.5}
    for name in study.VARIED:
        assert all(getattr(each, name) != getattr(run, name) for each in study.variants(run, [name]))
        assert study.variants(run, [name])
    assert len(study.variants(run, [])) == sum(len(study.variants(run, [name])) for name in study.VARIED)


def test_a_backbone_learns_after_the_steps_in_which_it_is_frozen():
    labels, images = torch.arange(8) % 2, torch.randn(8, 3, 32, 32)
    run = study.Run("d", "b", 32, True, "api", "test", 0, 0.01, 20, 2, 4)
    weights = []
    for frozen in (0, 5, 20):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=0)
        before = next(net.parameters()).clone()
        study.train(study.replace(run, frozen_steps=frozen), images, labels, 2, net)
        weights.append(torch.dist(before, next(net.parameters())).item())
    assert weights[0] > weights[1] > weights[2] == 0


def test_the_backbone_can_be_tuned(finished, monkeypatch):
    folder, command = finished
    before = len(rows_of(folder))
    for name, value in {"CHOOSING": study.CHOOSING[:1], "RATES": (1e-3, 1e-2), "FIRST_TUNED": slice(0, 2)}.items():
        monkeypatch.setattr(study, name, value)
    study.main([*command, "--fine-tune", "--methods", "api", "supcon"])
    new = rows_of(folder)[before:]
    assert {row["tuned"] for row in new} == {True}
    assert {row["part"] for row in new} == {"validation", "test"}


def test_splits_share_no_image_and_take_so_many_of_each_class():
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 9)
    train, validation = study.split(labels, 5, seed=3)
    assert not set(train) & set(validation)
    assert labels[train].bincount().tolist() == [5, 5, 5]
    assert labels[validation].bincount().tolist() == [10, 3, 2]
    assert (train, validation) == study.split(labels, 5, seed=3)
    assert (train, validation) != study.split(labels, 5, seed=4)


def test_figures_are_those_of_scikit_learn_and_of_the_formulas():
    torch.manual_seed(0)
    labels = torch.randint(4, (500,))
    logits = 2 * torch.randn(500, 4) + torch.nn.functional.one_hot(labels, 4)
    found = study.measure(logits, labels)
    likely = logits.double().softmax(1).numpy()
    assert found["accuracy"] == pytest.approx(float((likely.argmax(1) == labels.numpy()).mean()))
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, likely.argmax(1)))
    error, confidence = 0.0, likely.max(1)
    for low in np.arange(study.BINS) / study.BINS:
        rows = (confidence >= low) & (confidence < low + 1 / study.BINS)
        if rows.any():
            right = likely[rows].argmax(1) == labels.numpy()[rows]
            error += rows.mean() * abs(right.mean() - confidence[rows].mean())
    assert found["calibration_error"] == pytest.approx(error)
    shares = np.bincount(labels, minlength=4) / 500
    assert found["prior_error"] == pytest.approx(0.5 * abs(likely.mean(0) - shares).sum())


def test_correcting_the_prior_turns_uniform_shares_into_those_of_the_training_images():
    # All images alike: balanced batches teach equal probabilities, and the correction gives the classes' shares.
    labels = torch.tensor([0] * 60 + [1] * 20)
    pool = study.Pool(torch.ones(80, 4), labels, torch.ones(80, 4), labels, 0)
    run = study.Run("d", "b", 0, False, "balanced", "test", 0, 0.01, 200, 2, 16)
    for method, weighted in (("balanced", False), ("api", False), ("shuffled", True)):
        row = study.execute(study.replace(run, method=method, weighted=weighted), pool, None)
        assert row["prior_error"] == pytest.approx(0.25, abs=0.06)
        assert row["adjusted_prior_error"] == pytest.approx(0, abs=0.06)
    for method, weighted in (("shuffled", False), ("balanced", True), ("api", True)):
        row = study.execute(study.replace(run, method=method, weighted=weighted), pool, None)
        assert row["prior_error"] == pytest.approx(0, abs=0.06)
        assert row["adjusted_prior_error"] == pytest.approx(0.25, abs=0.06)


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.02, 20), rng.normal(0.69, 0.02, 20)
    gap = study_tables.difference([{"x": v} for v in a], [{"x": v} for v in b], "x")
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (gap.mean - gap.seeds, gap.mean + gap.seeds) == pytest.approx((low, high))
    assert gap.images is None


def test_intervals_over_test_images_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        image = rng.normal(size=300)  # an image's gap is the same for all seeds
        seeds = rng.normal(size=(8, 1))
        first = rng.random((8, 300)) < 0.6 + 0.1 * np.tanh(image) + 0.02 * seeds
        second = rng.random((8, 300)) < 0.6
        rows = [
            [{"accuracy": row.mean(), "right": "".join("01"[int(bit)] for bit in row)} for row in part]
            for part in (first, second)
        ]
        gap = study_tables.difference(*rows, "accuracy")
        held += abs(gap.mean) <= gap.images
    assert held >= 185
