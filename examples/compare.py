"""Train the baseline and API-Net on the same data, with the same flags and seeds, and write a table of both.

A seed stands for a split, the batches, crops and first weights. What is finished is not trained again.

python examples/compare.py DIR --seeds 3 --out runs/compare --epochs 30    # further flags go to train_own.py
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METHODS = {"baseline": ["--baseline"], "api": []}
TITLES = {"baseline": "Baseline", "api": "API-Net"}
COLUMNS = {
    "test accuracy (%)": lambda run: 100 * run["accuracy"],
    "mean of the classes' accuracies (%)": lambda run: 100 * run["mean_class_accuracy"],
    "training accuracy, last epoch (%)": lambda run: 100 * run["history"][-1]["train_accuracy"],
}
Runs = dict[str, list[dict[str, Any]]]


def train_all(source: Path, folder: Path, seeds: int, flags: list[str]) -> Runs:
    """For each method the metrics of each seed; seed by seed, so that an interrupted comparison has both methods."""
    runs: Runs = {method: [] for method in METHODS}
    for seed in range(seeds):
        for method, own in METHODS.items():
            out = folder / f"{method}-seed{seed}"
            given = [*flags, *own, "--seed", str(seed)]
            done = folder / f"{out.name}.json"  # written last, and not into the folder, which has to be empty
            if not done.exists():
                print(f"{out.name}: {' '.join(given)}", flush=True)
                script = str(Path(__file__).with_name("train_own.py"))
                command = [sys.executable, script, str(source), "--out", str(out), "--overwrite", *given]
                subprocess.run(command, check=True)
                done.write_text(json.dumps(given))
            elif json.loads(done.read_text()) != given:
                raise SystemExit(f"{out} was trained with other flags: choose another --out, or remove it")
            runs[method].append(json.loads((out / "metrics.json").read_text(encoding="utf-8")))
    return runs


def table(runs: Runs) -> str:
    """Mean and standard deviation over the seeds, differences seed by seed, and where the figures come from."""
    lines = [f"| method | {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for method, of_seeds in runs.items():
        cells = [spread([figure(run) for run in of_seeds]) for figure in COLUMNS.values()]
        lines.append(f"| {TITLES[method]} | {' | '.join(cells)} |")
    gains = {
        name: [figure(a) - figure(b) for a, b in zip(runs["api"], runs["baseline"], strict=True)]
        for name, figure in list(COLUMNS.items())[:2]
    }
    one = runs["api"][0]
    minutes = sum(run["minutes"] for of_seeds in runs.values() for run in of_seeds)
    lines += [
        "",
        "API-Net less baseline, in points: "
        + "; ".join(f"{name.removesuffix(' (%)')} {spread(of)} (by seed: {_signed(of)})" for name, of in gains.items())
        + ".",
        "",
        f"To name the largest class always would make {100 * one['largest_class_share']:.1f} % right. "
        f"{one['data']['name']}: {len(one['classes'])} classes, {one['data']['train']} training and "
        f"{one['data']['test']} test images, each seed with a split of its own if the data has none; "
        f"{_settings(one['settings'])}. {len(runs['api'])} seeds, {minutes:.0f} minutes in all, "
        "last epoch, mean ± standard deviation over the seeds. "
        f"{one['machine']}.",
    ]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """ "mean ± standard deviation", or the one value there is."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.1f}" for value in values)


def _settings(settings: dict[str, Any]) -> str:
    weights = "from scratch" if settings["no_pretrained"] else "pretrained"
    return (
        f"{settings['backbone']} {weights}, {settings['image_size']} x {settings['image_size']} pixels, batches of "
        f"{settings['n_classes']} classes x {settings['n_samples']} images, {settings['epochs']} epochs, AdamW with "
        f"learning rate {settings['lr']:g} ({settings['backbone_lr']:g} for the backbone)"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="as for train_own.py")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, help="Markdown file (default: table.md in --out)")
    options, flags = parser.parse_known_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        text = table(train_all(options.source, options.out, options.seeds, flags))
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"train_own.py ended with {error.returncode}") from None
    (options.table or options.out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
