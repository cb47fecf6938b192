"""Tables and a plot of the lines of study.py, with 95 % intervals of the differences between methods."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from workbench.tables import markdown, spread

Row = dict[str, Any]
TITLES = {
    "api": "API-Net",
    "balanced": "cross-entropy, balanced",
    "shuffled": "cross-entropy, shuffled",
    "supcon": "contrastive + cross-entropy",
    "api-embedding": "API-Net, embedding",
    "balanced-embedding": "cross-entropy, balanced, embedding",
}
COMPARED = {
    ("api", "balanced"): "k",
    ("api", "shuffled"): "0.6",
    ("api", "supcon"): "C3",
    ("api-embedding", "balanced-embedding"): "C0",
    ("api-embedding", "supcon"): "C1",
    ("supcon", "balanced-embedding"): "C2",
}  # the first less the second; colours of the plot
PLACE = ("data", "backbone", "image_size", "tuned")
SETTINGS = (
    "lr", "steps", "n_classes", "n_samples", "margin", "rank_weight", "dropout", "mutual", "weighted", "frozen_steps",
)  # fmt: skip
FIGURES = {
    "accuracy": "accuracy (%)",
    "mean_class_accuracy": "mean of classes (%)",
    "calibration_error": "calibration error (%)",
}


class Difference(NamedTuple):
    """Of two methods on the same seeds and test images: its mean, and half the widths of two intervals of 95 %.

    `seeds` is for these test images, and other training images and first weights; `images` is for other test images,
    too: the variances of seeds and of images are added, which is a little too wide.
    """

    mean: float
    seeds: float
    images: float | None

    def text(self, both: bool = True) -> str:
        wider = "" if self.images is None or not both else f" ({100 * self.images:.1f})"
        return f"{100 * self.mean:+.1f} ± {100 * self.seeds:.1f}{wider}"


def difference(first: Sequence[Row], second: Sequence[Row], figure: str) -> Difference:
    """First less second, seed by seed."""
    values = [a[figure] - b[figure] for a, b in zip(first, second, strict=True)]
    quantile = float(student.ppf(0.975, len(values) - 1))
    of_seeds = statistics.variance(values) / len(values)
    both = None
    if figure == "accuracy" and "right" in first[0]:
        right = [np.array([[float(bit) for bit in row["right"]] for row in rows]).mean(0) for rows in (first, second)]
        of_images = float((right[0] - right[1]).var(ddof=1)) / len(right[0])
        both = quantile * math.sqrt(of_seeds + of_images)
    return Difference(statistics.mean(values), quantile * math.sqrt(of_seeds), both)


def write(folder: Path, rows: Sequence[Row]) -> None:
    """study.md, study.csv and study.png."""

    def order(row: Row) -> tuple[object, ...]:
        name, _, images = row["data"].partition(":")
        return name, int(images or 0), row["tuned"], row["backbone"]

    rows = sorted(rows, key=order)  # methods stay as they were
    tested, varied = ([row for row in rows if row["part"] == part] for part in ("test", "validation"))
    machines = ". ".join(dict.fromkeys(row["machine"] for row in rows))
    hours = sum(row["seconds"] for row in rows) / 3600
    parts = ["# API-Net with pretrained weights"]
    parts += [f"{len(rows)} runs, {hours:.1f} hours of processor time in training. {machines}."]
    parts += ["## Methods", methods(tested), "## Differences", differences(tested)]
    parts += ["## The prior", priors(tested), "## What users vary", variations(varied)]
    (folder / "study.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    names = [name for name in rows[0] if name not in ("right", "machine")] if rows else []
    with (folder / "study.csv").open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, names, extrasaction="ignore")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if tested:
        plot(folder / "study.png", tested)


def methods(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the seeds."""
    columns = ["data", "backbone", "method", *FIGURES.values(), "cross-entropy", "learning rate", "seconds", "seeds"]
    lines = []
    for of_method in _groups(rows, (*PLACE, "method", "lr")):
        seconds = statistics.median(row["seconds"] for row in of_method)
        cells = [spread([row["cross_entropy"] for row in of_method], 2), f"{of_method[0]['lr']:g}", f"{seconds:.1f}"]
        lines.append([*_names(of_method), *_spreads(of_method), *cells, str(len(of_method))])
    return markdown(columns, lines, names=3)


def compared(rows: Sequence[Row]) -> Iterable[tuple[list[Row], list[Row]]]:
    """The rows of two methods on the same seeds."""
    for group in _groups(rows, PLACE):
        for names in COMPARED:
            first, second = ({row["seed"]: row for row in group if row["method"] == name} for name in names)
            seeds = sorted(first.keys() & second.keys())
            if len(seeds) > 1:
                yield [first[seed] for seed in seeds], [second[seed] for seed in seeds]


def differences(rows: Sequence[Row]) -> str:
    about = (
        "The first method less the second, in points, with 95 % intervals over the seeds, for these test images (in "
        "brackets: for other test images, too). A negative difference of the calibration error favours the first."
    )
    columns = ["data", "backbone", "first", "second", "accuracy", "mean of classes", "calibration error", "seeds"]
    lines = []
    for first, second in compared(rows):
        cells = [difference(first, second, figure).text() for figure in FIGURES]
        lines.append([*_names(first), TITLES[second[0]["method"]], *cells, str(len(first))])
    return f"{about}\n\n{markdown(columns, lines, names=4)}"


def priors(rows: Sequence[Row]) -> str:
    """What balanced batches do, and what a correction of the prior at test time does."""
    about = (
        "The prior's error is half the sum over the classes of the difference between their mean probability and their "
        "share of the test images. Corrected: logarithms of the classes' shares of the training images are added to "
        "the logits of methods with balanced batches, and subtracted from those of shuffled ones."
    )
    columns = ["data", "backbone", "method", "prior's error (%)", "corrected", "accuracy gained"]
    columns += ["mean of classes gained", "calibration error gained"]
    lines = []
    for group in _groups(rows, (*PLACE, "method")):
        if group[0]["data"].startswith("birds") or len(group) < 2:  # as many of each class
            continue
        errors = [100 * statistics.mean(row[f"{kind}prior_error"] for row in group) for kind in ("", "adjusted_")]
        adjusted = [{figure: row[f"adjusted_{figure}"] for figure in FIGURES} for row in group]
        gains = [difference(adjusted, group, figure).text(both=False) for figure in FIGURES]
        lines.append([*_names(group), *(f"{value:.1f}" for value in errors), *gains])
    return f"{about}\n\n{markdown(columns, lines, names=3)}"


def variations(rows: Sequence[Row]) -> str:
    """On validation images: learning rates as they are, other settings less the base at the learning rate chosen."""
    about = "On validation images, mean over the seeds on which learning rates were chosen."
    lines = []
    for group in _groups(rows, (*PLACE, "method")):
        for of_setting in _groups(group, SETTINGS):
            one = of_setting[0]
            other = [f"{name} {one[name]}" for name in SETTINGS if name == "lr" or one[name] != group[0][name]]
            lines.append([*_names(of_setting), ", ".join(other), *_spreads(of_setting), str(len(of_setting))])
    columns = ["data", "backbone", "method", "settings", *FIGURES.values(), "seeds"]
    return f"{about}\n\n{markdown(columns, lines, names=4)}"


def plot(file: Path, rows: Sequence[Row]) -> None:
    """Differences of accuracy with their intervals: thick for the seeds, thin for other test images too."""
    places = _groups(rows, PLACE)[::-1]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(places)), layout="constrained")
    axes = figure.subplots()
    shown = set()
    for place, group in enumerate(places):
        for first, second in compared(group):
            names, gap = (first[0]["method"], second[0]["method"]), difference(first, second, "accuracy")
            height = place + 0.3 - 0.12 * list(COMPARED).index(names)  # beside each other
            label = None if names in shown else f"{TITLES[names[0]]} less {TITLES[names[1]]}"
            shown.add(names)
            bar = {"x": 100 * gap.mean, "y": height, "color": COMPARED[names]}
            axes.errorbar(**bar, xerr=100 * (gap.images or 0), lw=1, fmt="none")
            axes.errorbar(**bar, xerr=100 * gap.seeds, lw=3, fmt="o", ms=4, label=label)
    axes.axvline(0, color="0.5", lw=1)
    axes.set_yticks(range(len(places)), [", ".join(_names(group)[:2]) for group in places], fontsize=8)
    axes.set_ylim(-0.7, len(places) - 0.3)
    axes.set_xlabel("difference of accuracy, in points")
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=110)


def _groups(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows alike in these fields together, in the order of the first ones."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def _names(rows: Sequence[Row]) -> list[str]:
    """Data, backbone and method."""
    row, state = rows[0], "trained" if rows[0]["tuned"] else "frozen"
    return [row["data"], f"{row['backbone']}, {row['image_size']} px, {state}", TITLES[row["method"]]]


def _spreads(rows: Sequence[Row]) -> list[str]:
    return [spread([100 * row[figure] for row in rows], 1) for figure in FIGURES]
