"""Run the paper's ablation: what each part of API-Net contributes, one change at a time, with shared seeds and budget.

Writes one table (Markdown, CSV) and one plot. Finished runs are kept: the same command resumes an interrupted one.

python examples/ablate.py --epochs 60                # all parts of the paper
python examples/ablate.py --only memory --seeds 5    # partners from past batches too, with small batches
"""

import csv
import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from workbench.datasets import open_data
from workbench.run_folder import write_text
from workbench.settings import Settings, parse
from workbench.sweep import Results, make_parser, origin, run_all
from workbench.tables import markdown, spread


class Row(NamedTuple):
    """One line of the table: the part it belongs to, what is changed, and the flags that change it."""

    group: str
    name: str
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name of the runs' folders; rows without a change share their runs."""
        return "-".join(flag.removeprefix("--") for flag in self.flags) or "default"


# Not in the paper, so it runs only when asked for: memories of past batches matter where batches are small.
MEMORY, SMALL_BATCHES = "memory", ["--n-classes", "8", "--n-samples", "2", "--epochs", "60"]
SIZES = (64, 256, 512)


def rows_of(settings: Settings, part: str | None = None) -> list[Row]:
    """The ablation's rows, or those of one part; batches vary around the settings' own."""
    classes, samples = settings.n_classes, settings.n_samples
    if part == MEMORY:
        group = f"memory, batches of {classes} classes x {samples} images"
        return [Row(group, "none"), *(Row(group, str(size), ("--memory", str(size))) for size in SIZES)]
    mutual = ("individual", "bilinear", "square_diff", "sum", "product", "weighted")
    searches = ("none", "dissimilar", "similar")
    pairs = [pair for pair in itertools.product(searches, searches) if pair != ("none", "none")]
    rows = [
        Row("method", "baseline", ("--method", "baseline")),
        Row("method", "API-Net"),
        *(Row("mutual vector", name, ("--mutual", name)) for name in mutual),
        Row("mutual vector", "mlp"),
        Row("gate", "single", ("--gate", "single", "--rank-weight", "0")),
        Row("gate", "pair, no ranking", ("--rank-weight", "0")),
        Row("gate", "pair"),
        Row("loss", "cross-entropy", ("--rank-weight", "0")),
        Row("loss", "cross-entropy + ranking"),
        Row("pairs", "random", ("--pairs", "random")),
        *(Row("pairs", f"intra {intra}, inter {inter}", _changed(intra=intra, inter=inter)) for intra, inter in pairs),
        *(Row("classes in a batch", str(n), ("--n-classes", str(n))) for n in (classes // 2, 2 * classes)),
        Row("classes in a batch", str(classes)),
        *(Row("images of a class", str(n), ("--n-samples", str(n))) for n in (samples // 2, 2 * samples)),
        Row("images of a class", str(samples)),
    ]
    return [row for row in rows if part in (None, row.group)]


def _changed(**searches: str) -> tuple[str, ...]:
    return tuple(text for name, how in searches.items() if how != "similar" for text in (f"--{name}", how))


def make_table(rows: Iterable[Row], results: Results) -> str:
    """A line per row; rows of the unchanged method are in bold."""
    columns = ["part", "variant", "test top-1 (%)", "against API-Net", "training top-1 (%)", "time per run (s)"]
    lines, default = [], [run["test_top1"] for run in results["default"]]
    for row in rows:
        runs = results[row.key]
        gains = [run["test_top1"] - own for run, own in zip(runs, default, strict=True)]
        test, train = (spread([run[name] for run in runs], 1) for name in ("test_top1", "train_top1"))
        name, gain = (row.name, spread(gains, 1)) if row.flags else (f"**{row.name}**", "")
        seconds = statistics.mean(run["seconds"] for run in runs)
        lines.append([row.group, name, test, gain, train, f"{seconds:.0f}"])
    return markdown(columns, lines, names=2)


def write_csv(file: Path, rows: Iterable[Row], results: Results) -> None:
    columns = ["test_top1", "test_top5", "train_top1", "errors_within_families", "errors_across_families", "seconds"]
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["part", "variant", "flags", "seed", *columns])
        for row in rows:
            for seed, run in enumerate(results[row.key]):
                writer.writerow([row.group, row.name, " ".join(row.flags), seed, *(run[name] for name in columns)])


def draw(file: Path, rows: list[Row], results: Results) -> None:
    """Each row's accuracy: a dot per seed and a bar at their mean; the unchanged method's mean as a line."""
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    groups = list(dict.fromkeys(row.group for row in rows))
    default = statistics.mean(run["test_top1"] for run in results["default"])
    axes.axvline(default, color="tab:blue", linewidth=1, linestyle="--", label="API-Net as published")
    for place, row in enumerate(rows):
        values = [run["test_top1"] for run in results[row.key]]
        colour = f"C{groups.index(row.group)}"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=5)
        axes.plot(statistics.mean(values), place, "|", color=colour, markersize=14, markeredgewidth=2.5)
    axes.set_yticks(range(len(rows)), [f"{row.group}: {row.name}" for row in rows], fontsize=8)
    for place, (row, before) in enumerate(zip(rows[1:], rows, strict=False), start=1):
        if row.group != before.group:
            axes.axhline(place - 0.5, color="lightgray", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="test top-1 (%): a dot per seed, a bar at their mean")
    axes.legend(frameon=False, loc="lower left")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = make_parser(__doc__, seeds=2, folder="runs/ablation")
    parser.add_argument("--only", metavar="PART", help="only the rows of this part, such as gate; memory is one too")
    options, flags = parser.parse_known_args()
    name = "ablation"
    if options.only == MEMORY:
        name, flags = MEMORY, [*SMALL_BATCHES, *flags]
        if options.runs == parser.get_default("runs"):
            options.runs = Path("runs/memory")  # other batches than the ablation's

    settings = parse(flags)
    data = open_data(settings)  # drawn once, before the runs would all do it
    rows = rows_of(settings, options.only)
    if not rows:
        parts = dict.fromkeys(row.group for row in rows_of(settings))
        parser.error(f"--only {options.only}: there are {', '.join(parts)} and {MEMORY}")
    results = run_all(options, {row.key: row.flags for row in rows} | {"default": ()}, flags)

    output = options.output or options.runs
    table = f"{make_table(rows, results)}\n\n{origin(data, settings, results)}\n"
    write_text(output / f"{name}.md", table)
    write_csv(output / f"{name}.csv", rows, results)
    draw(output / f"{name}.png", rows, results)
    print(f"\n{table}\n{output}/{name}.md, .csv, .png")


if __name__ == "__main__":
    main()
