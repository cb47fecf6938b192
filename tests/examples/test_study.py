"""The study, from the command line to its tables, and its statistics."""

import json

import numpy as np
import pytest
import timm
import torch
from colours import write_colours
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import study
from workbench import study_tables

RUN = study.Run("d", "b", 0, True, "api", "test", 0, 0.01, 200, 2, 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study of colours, and its command."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    command = [f"colours={write_colours(folder / 'colours')}", "--weights", f"test_resnet={folder / 'weights.pth'}"]
    command += ["--out", str(folder / "out"), "--steps", "20", "--seeds", "2", "--image-size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(study, "CHOOSING", study.CHOOSING[:2])
        study.main(command)
        yield folder / "out", command


def rows_of(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def added(finished, *flags):
    """The rows that the command adds with these flags."""
    folder, command = finished
    before = len(rows_of(folder))
    study.main([*command, *flags])
    return rows_of(folder)[before:]


def test_every_method_is_chosen_on_validation_images_and_tested_with_the_same_seeds(finished):
    for method in study.METHODS:
        rows = [row for row in rows_of(finished[0]) if row["method"] == method]
        chosen, tested = ([row for row in rows if row["part"] == part] for part in ("validation", "test"))
        rates = sorted({row["lr"] for row in chosen})
        assert sorted((row["lr"], row["seed"]) for row in chosen) == [(lr, s) for lr in rates for s in study.CHOOSING]
        means = {lr: np.mean([row["accuracy"] for row in chosen if row["lr"] == lr]) for lr in rates}
        best = max(rates, key=means.get)
        assert [(row["seed"], row["lr"]) for row in tested] == [(0, best), (1, best)]
        place = study.RATES.index(best)  # the rates beside it were tried
        assert set(study.RATES[max(0, place - 1) : place + 2]) <= set(rates)


def test_a_finished_study_trains_nothing_and_one_that_was_stopped_only_the_rest(finished, monkeypatch):
    folder, command = finished
    trained, execute = [], study.execute
    monkeypatch.setattr(study, "execute", lambda run, *args: trained.append(run) or execute(run, *args))
    before = (folder / "runs.jsonl").read_text()
    assert added(finished) == trained == []
    assert (folder / "runs.jsonl").read_text() == before

    lines = before.splitlines(keepends=True)
    (folder / "runs.jsonl").write_text("".join(lines[:-2]) + lines[-2][:50])  # stopped in the midst of a line
    study.main(command)
    assert len(trained) == 2
    again, first = rows_of(folder), [json.loads(line) for line in lines]
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in first]


def test_tables_and_plot_are_written_from_the_runs_alone(finished):
    folder, _ = finished
    (folder / "study.md").unlink()
    study.main(["--out", str(folder)])
    text = (folder / "study.md").read_text()
    assert "| colours | test_resnet, 32 px, frozen | API-Net |" in text
    assert f"torch {torch.__version__}" in text
    assert (folder / "study.png").stat().st_size > 1000
    assert len((folder / "study.csv").read_text().splitlines()) == 1 + len(rows_of(folder))


def test_varied_settings_never_see_a_test_image_and_the_backbone_can_be_tuned(finished, monkeypatch):
    for name, value in {"CHOOSING": study.CHOOSING[:1], "RATES": (1e-3, 1e-2), "FIRST_TUNED": slice(0, 2)}.items():
        monkeypatch.setattr(study, name, value)
    tuned = added(finished, "--fine-tune", "--methods", "api", "supcon")
    assert {(row["tuned"], row["part"]) for row in tuned} == {(True, "validation"), (True, "test")}
    monkeypatch.setattr(study, "FIRST_FROZEN", slice(0, 2))
    varied = added(finished, "--vary", "--methods", "api")
    assert {row["part"] for row in varied} == {"validation"}
    assert {row["rank_weight"] for row in varied} == {0.0, 1.0, 3.0}


def test_settings_can_be_varied_by_name():
    assert [each.frozen_steps for each in study.variants(RUN, ["frozen_steps"])] == [20, 100]
    assert {each.margin for each in study.variants(RUN, ["margin"])} == {0.0, 0.2, 0.5}
    found = {name: study.variants(RUN, [name]) for name in study.VARIED}
    assert all(runs and all(getattr(run, name) != getattr(RUN, name) for run in runs) for name, runs in found.items())
    assert len(study.variants(RUN, [])) == sum(map(len, found.values()))


def test_a_backbone_learns_after_the_steps_in_which_it_is_frozen():
    labels, images = torch.arange(8) % 2, torch.randn(8, 3, 32, 32)
    moved = []
    for frozen in (0, 5, 20):
        torch.manual_seed(0)
        net = timm.create_model("test_resnet", num_classes=0)
        before = next(net.parameters()).clone()
        study.train(study.replace(RUN, steps=20, n_samples=4, frozen_steps=frozen), images, labels, 2, net)
        moved.append(torch.dist(before, next(net.parameters())).item())
    assert moved[0] > moved[1] > moved[2] == 0


def test_splits_share_no_image_and_take_so_many_of_each_class():
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 9)
    train, validation = study.split(labels, 5, seed=3)
    assert not set(train) & set(validation)
    assert labels[train].bincount().tolist() == [5, 5, 5]
    assert labels[validation].bincount().tolist() == [10, 3, 2]
    assert (train, validation) == study.split(labels, 5, seed=3) != study.split(labels, 5, seed=4)


def test_figures_are_those_of_scikit_learn_and_of_the_formulas():
    torch.manual_seed(0)
    labels = torch.randint(4, (500,))
    logits = 2 * torch.randn(500, 4) + torch.nn.functional.one_hot(labels, 4)
    found, likely = study.measure(logits, labels), logits.double().softmax(1).numpy()
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, likely.argmax(1)))
    assert found["mean_class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, likely.argmax(1)))
    error, confidence, right = 0.0, likely.max(1), likely.argmax(1) == labels.numpy()
    for low in np.arange(study.BINS) / study.BINS:
        rows = (confidence >= low) & (confidence < low + 1 / study.BINS)
        error += abs((right[rows] - confidence[rows]).sum()) / 500
    assert found["calibration_error"] == pytest.approx(error)
    shares = np.bincount(labels, minlength=4) / 500
    assert found["prior_error"] == pytest.approx(0.5 * abs(likely.mean(0) - shares).sum())


@pytest.mark.parametrize("method", ["balanced", "api", "shuffled"])
@pytest.mark.parametrize("weighted", [False, True])
def test_correcting_the_prior_turns_uniform_shares_into_those_of_the_training_images(method, weighted):
    # All images alike: balanced batches teach equal probabilities, and the correction gives the classes' shares.
    labels = torch.tensor([0] * 60 + [1] * 20)
    pool = study.Pool(torch.ones(80, 4), labels, torch.ones(80, 4), labels, 0)
    row = study.execute(study.replace(RUN, tuned=False, method=method, weighted=weighted), pool, None)
    expected = [0.25, 0] if (method == "shuffled") == weighted else [0, 0.25]
    assert [row["prior_error"], row["adjusted_prior_error"]] == pytest.approx(expected, abs=0.06)


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.7, 0.02, 20), rng.normal(0.69, 0.02, 20)
    gap = study_tables.difference([{"x": v} for v in a], [{"x": v} for v in b], "x")
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (gap.mean - gap.seeds, gap.mean + gap.seeds) == pytest.approx((low, high))
    assert gap.images is None


def test_intervals_over_test_images_hold_the_truth_as_often_as_they_say():
    def row(right):
        return {"accuracy": right.mean(), "right": "".join("01"[int(bit)] for bit in right)}

    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        image = rng.normal(size=300)  # an image's gap is the same for all seeds
        seeds = rng.normal(size=(8, 1))
        first = rng.random((8, 300)) < 0.6 + 0.1 * np.tanh(image) + 0.02 * seeds
        second = rng.random((8, 300)) < 0.6
        gap = study_tables.difference([*map(row, first)], [*map(row, second)], "accuracy")
        held += abs(gap.mean) <= gap.images
    assert held >= 185
