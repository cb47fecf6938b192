"""Tables and a plot of the lines of study.py, with 95 % intervals of the differences between methods."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

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
SETTINGS = (
    "data", "backbone", "image_size", "tuned", "method", "part", "lr", "steps", "n_classes", "n_samples", "margin",
    "rank_weight", "dropout", "mutual", "weighted", "frozen_steps",
)  # fmt: skip
FIGURES = ("accuracy", "mean_class_accuracy", "calibration_error")


class Difference(NamedTuple):
    """Of two methods on the same seeds and test images: its mean, and half the widths of two intervals of 95 %.

    `seeds` is for these test images, and other training images and first weights; `images` is for other test images,
    too: the variances of seeds and of images are added, which is a little too wide.
    """

    mean: float
    seeds: float
    images: float | None

    def text(self, scale: float = 100, both: bool = True) -> str:
        wider = "" if self.images is None or not both else f" ({scale * self.images:.1f})"
        return f"{scale * self.mean:+.1f} ± {scale * self.seeds:.1f}{wider}"


def difference(first: Sequence[Row], second: Sequence[Row], figure: str) -> Difference:
    """First less second, seed by seed."""
    values = [a[figure] - b[figure] for a, b in zip(first, second, strict=True)]
    quantile = float(student.ppf(0.975, len(values) - 1))
    of_seeds = statistics.variance(values) / len(values)
    both = None
    if figure == "accuracy" and "right" in first[0]:
        gaps = np.array([_bits(a) - _bits(b) for a, b in zip(first, second, strict=True)]).mean(0)
        of_images = float(gaps.var(ddof=1)) / len(gaps)
        both = quantile * math.sqrt(of_seeds + of_images)
    return Difference(statistics.mean(values), quantile * math.sqrt(of_seeds), both)


def _bits(row: Row) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.array([float(bit) for bit in row["right"]])


def write(folder: Path, rows: Sequence[Row]) -> None:
    """study.md, study.csv and study.png."""
    rows = sorted(rows, key=_order)
    tested, varied = ([row for row in rows if row["part"] == part] for part in ("test", "validation"))
    parts = [_origin(rows), "## Methods", methods(tested), "## Differences", differences(tested)]
    parts += ["## The prior", priors(tested), "## What users vary", variations(varied)]
    text = "\n\n".join(["# API-Net with pretrained weights", *parts])
    (folder / "study.md").write_text(f"{text}\n", encoding="utf-8")
    names = [name for name in rows[0] if name not in ("right", "machine")] if rows else []
    with (folder / "study.csv").open("w", newline="", encoding="utf-8") as lines:
        table = csv.DictWriter(lines, names, extrasaction="ignore")
        table.writeheader()
        table.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if tested:
        plot(folder / "study.png", tested)


def methods(rows: Sequence[Row]) -> str:
    """Mean and standard deviation over the seeds."""
    lines = [
        "| data | backbone | method | accuracy (%) | mean of classes (%) | calibration error (%) | cross-entropy | "
        "learning rate | seconds | seeds |",
        "| --- | --- | --- |" + " ---: |" * 7,
    ]
    for group in _groups(rows, ("data", "backbone", "tuned")):
        for of_method in _groups(group, ("method", "lr")):
            one = of_method[0]
            cells = [_spread([100 * row[figure] for row in of_method], 1) for figure in FIGURES]
            cells.append(_spread([row["cross_entropy"] for row in of_method], 2))
            seconds = statistics.median(row["seconds"] for row in of_method)
            cells += [f"{one['lr']:g}", f"{seconds:.1f}", str(len(of_method))]
            lines.append(f"| {_place(one)} | {TITLES[one['method']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(rows: Sequence[Row]) -> Iterable[tuple[list[Row], list[Row]]]:
    """The rows of two methods on the same seeds."""
    for group in _groups(rows, ("data", "backbone", "tuned")):
        for names in COMPARED:
            first, second = ({row["seed"]: row for row in group if row["method"] == name} for name in names)
            seeds = first.keys() & second.keys()
            if len(seeds) > 1:
                yield [first[seed] for seed in sorted(seeds)], [second[seed] for seed in sorted(seeds)]


def differences(rows: Sequence[Row]) -> str:
    lines = [
        "The first method less the second, in points, with 95 % intervals over the seeds, for these test images (in "
        "brackets: for other test images, too). A negative difference of the calibration error favours the first.",
        "",
        "| data | backbone | first | second | accuracy | mean of classes | calibration error | seeds |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for first, second in compared(rows):
        cells = " | ".join(difference(first, second, figure).text() for figure in FIGURES)
        titles = f"{TITLES[first[0]['method']]} | {TITLES[second[0]['method']]}"
        lines.append(f"| {_place(first[0])} | {titles} | {cells} | {len(first)} |")
    return "\n".join(lines)


def priors(rows: Sequence[Row]) -> str:
    """What balanced batches do, and what a correction of the prior at test time does."""
    lines = [
        "The prior's error is half the sum over the classes of the difference between their mean probability and their "
        "share of the test images. Corrected: logarithms of the classes' shares of the training images are added to "
        "the logits of methods with balanced batches, and subtracted from those of shuffled ones.",
        "",
        "| data | backbone | method | prior's error (%) | corrected | accuracy gained | mean of classes gained | "
        "calibration error gained |",
        "| --- | --- | --- |" + " ---: |" * 5,
    ]
    for group in _groups(rows, ("data", "backbone", "tuned", "method")):
        if group[0]["data"].startswith("birds") or len(group) < 2:  # as many of each class
            continue
        plain = [100 * statistics.mean(row[f"{kind}prior_error"] for row in group) for kind in ("", "adjusted_")]
        gains = [difference(_adjusted(group), group, figure).text(both=False) for figure in FIGURES]
        cells = " | ".join([*(f"{value:.1f}" for value in plain), *gains])
        lines.append(f"| {_place(group[0])} | {TITLES[group[0]['method']]} | {cells} |")
    return "\n".join(lines)


def _adjusted(rows: Sequence[Row]) -> list[Row]:
    return [{figure: row[f"adjusted_{figure}"] for figure in FIGURES} for row in rows]


def variations(rows: Sequence[Row]) -> str:
    """On validation images: learning rates as they are, other settings less the base at the learning rate chosen."""
    lines = [
        "On validation images, mean over the seeds on which learning rates were chosen.",
        "",
        "| data | backbone | method | settings | accuracy (%) | mean of classes (%) | calibration error (%) | seeds |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for group in _groups(rows, ("data", "backbone", "tuned", "method")):
        settings = _groups(group, SETTINGS)
        base = settings[0][0]
        for of_setting in settings:
            one = of_setting[0]
            other = [f"{name} {one[name]}" for name in SETTINGS[6:] if name == "lr" or one[name] != base[name]]
            cells = [_spread([100 * row[figure] for row in of_setting], 1) for figure in FIGURES]
            lines.append(
                f"| {_place(one)} | {TITLES[one['method']]} | {', '.join(other)} | {' | '.join(cells)} | "
                f"{len(of_setting)} |"
            )
    return "\n".join(lines)


def plot(file: Path, rows: Sequence[Row]) -> None:
    """Differences of accuracy with their intervals: thick for the seeds, thin for other test images too."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places = _groups(rows, ("data", "backbone", "tuned"))[::-1]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.45 * len(places)), layout="constrained")
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
    axes.set_yticks(range(len(places)), [_place(group[0]).replace(" |", ",") for group in places], fontsize=8)
    axes.set_ylim(-0.7, len(places) - 0.3)
    axes.set_xlabel("difference of accuracy, in points")
    figure.legend(fontsize=8, loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _groups(rows: Sequence[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows alike in these fields together, in the order of the first ones."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def _order(row: Row) -> tuple[object, ...]:
    """Data sets by name and number of images, then frozen backbones before trained ones; methods stay as they were."""
    name, _, images = row["data"].partition(":")
    return name, int(images or 0), row["tuned"], row["backbone"]


def _place(row: Row) -> str:
    return f"{row['data']} | {row['backbone']}, {row['image_size']} px, {'trained' if row['tuned'] else 'frozen'}"


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _origin(rows: Sequence[Row]) -> str:
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    total: Callable[..., float] = sum
    hours = total(row["seconds"] for row in rows) / 3600
    return f"{len(rows)} runs, {hours:.1f} hours of processor time in training. {'. '.join(machines)}."
