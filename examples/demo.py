"""Train the baseline and API-Net on the embedded birds, with the same seeds, and compare them.

Writes a folder per run, and over all runs table.md and comparison.png.
"""

import statistics
import time
from pathlib import Path

from matplotlib.figure import Figure

from workbench.datasets import open_data
from workbench.run_folder import write_text
from workbench.settings import parse
from workbench.sweep import Results, make_parser, origin, read_log, run_all
from workbench.tables import markdown, spread

METHODS = {"baseline": "Baseline", "api": "API-Net"}
COLOURS = {"baseline": "tab:gray", "api": "tab:blue"}
COLUMNS = {
    "test top-1 (%)": "test_top1",
    "test top-5 (%)": "test_top5",
    "errors within family": "errors_within_families",
    "errors across families": "errors_across_families",
    "training top-1 (%)": "train_top1",
    "training cross-entropy": "cross_entropy",
    "training time (s)": "seconds",
}


def make_table(results: Results) -> str:
    rows = [
        [title, *(spread([run[name] for run in results[method]]) for name in COLUMNS.values())]
        for method, title in METHODS.items()
    ]
    gains = [a["test_top1"] - b["test_top1"] for a, b in zip(results["api"], results["baseline"], strict=True)]
    gained = f"API-Net less baseline, seed by seed: {spread(gains)} points of test top-1."
    return f"{markdown(['method', *COLUMNS], rows)}\n\n{gained}"


def draw(folder: Path, results: Results, file: Path) -> None:
    """Test accuracy over the epochs, each seed thin and the mean thick; and where the errors fall at the end."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, (method, title) in enumerate(METHODS.items()):
        logs = [read_log(folder / f"{method}-seed{seed}") for seed in range(len(results[method]))]
        series = [[(int(row["epoch"]), float(row["test_top1"])) for row in log if row["test_top1"]] for log in logs]
        epochs = [epoch for epoch, _ in series[0]]
        for line in series:
            curves.plot(*zip(*line, strict=True), color=COLOURS[method], alpha=0.35, linewidth=1)
        means = [statistics.mean(top1 for _, top1 in points) for points in zip(*series, strict=True)]
        mark = "o" if len(epochs) == 1 else ""  # a short run is tested once
        curves.plot(epochs, means, marker=mark, color=COLOURS[method], linewidth=2.5, label=title)
        for shift, name in enumerate(("errors_within_families", "errors_across_families")):
            values, x = [run[name] for run in results[method]], shift + (place - 0.5) * 0.36
            bars.bar(x, statistics.mean(values), 0.34, color=COLOURS[method], alpha=0.8)
            bars.plot([x] * len(values), values, "o", color="black", markersize=3)
    curves.set(xlabel="epoch", ylabel="test top-1 (%)", ylim=(0, 100), title="Embedded birds: accuracy")
    curves.legend(frameon=False, loc="lower right")
    curves.grid(alpha=0.3)
    bars.set_xticks([0, 1], ["within a family", "across families"])
    bars.set(ylabel=f"errors on {results['api'][0]['images']} test images", title="Where the errors fall")
    figure.savefig(file, dpi=120)


def main() -> None:
    options, flags = make_parser(__doc__, seeds=2, folder="runs/demo").parse_known_args()
    start, output = time.perf_counter(), options.output or options.runs
    settings = parse(flags)
    data = open_data(settings)  # drawn once, before the runs would all do it
    results = run_all(options, {method: ["--method", method] for method in METHODS}, flags)
    table = f"{make_table(results)}\n\n{origin(data, settings, results)}"
    write_text(output / "table.md", table + "\n")
    draw(options.runs, results, output / "comparison.png")
    print(f"\n{table}\n\n{output}/table.md and comparison.png, in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
