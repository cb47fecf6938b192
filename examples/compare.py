"""Is API-Net better than cross-entropy on your images? Train both with the same flags and seeds, and write a table.

A seed stands for a split, the batches, crops and first weights. What is finished is not trained again.

python examples/compare.py DIR --seeds 3 --out runs/compare --epochs 30    # further flags go to train_own.py
python examples/compare.py DIR --against balanced shuffled
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from workbench import Command, number
from workbench.tables import markdown, spread

TITLES = {
    "api": "API-Net",
    "balanced": "Cross-entropy, the same balanced batches",
    "shuffled": "Cross-entropy, shuffled images",
}
COLUMNS = {
    "test accuracy (%)": lambda run: 100 * run["accuracy"],
    "mean of the classes' accuracies (%)": lambda run: 100 * run["mean_class_accuracy"],
    "training accuracy, last epoch (%)": lambda run: 100 * run["history"][-1]["train_accuracy"],
}
Runs = dict[str, list[dict[str, Any]]]


def train_all(source: Path, folder: Path, methods: list[str], seeds: int, flags: list[str]) -> Runs:
    """For each method the metrics of each seed; seed by seed, so that an interrupted comparison has all methods."""
    runs: Runs = {method: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            out = folder / f"{method}-seed{seed}"
            given = [*flags, *(["--baseline", method] if method != "api" else []), "--seed", str(seed)]
            done = folder / f"{out.name}.json"  # written last
            if not done.exists():
                print(f"{out.name}: {' '.join(given)}", flush=True)
                script = str(Path(__file__).with_name("train_own.py"))
                subprocess.run([sys.executable, script, str(source), "--out", str(out), *given], check=True)
                done.write_text(json.dumps(given))
            elif json.loads(done.read_text()) != given:
                raise SystemExit(f"{out} was trained with other flags: choose another --out, or remove it")
            runs[method].append(json.loads((out / "metrics.json").read_text(encoding="utf-8")))
    return runs


def table(runs: Runs) -> str:
    """Mean and standard deviation over the seeds, differences seed by seed, and where the figures come from."""
    rows = [
        [TITLES[method], *(spread([figure(run) for run in of_seeds], 1) for figure in COLUMNS.values())]
        for method, of_seeds in runs.items()
    ]
    parts = [markdown(["method", *COLUMNS], rows)]
    for method in [name for name in runs if name != "api"]:
        gains = []
        for name, figure in list(COLUMNS.items())[:2]:
            values = [figure(a) - figure(b) for a, b in zip(runs["api"], runs[method], strict=True)]
            by_seed = ", ".join(f"{value:+.1f}" for value in values)
            gains.append(f"{name.removesuffix(' (%)')} {spread(values, 1)} (by seed: {by_seed})")
        parts.append(f"API-Net less {TITLES[method].lower()}, in points: {'; '.join(gains)}.")
    one, settings = runs["api"][0], runs["api"][0]["settings"]
    weights = "from scratch" if settings["no_pretrained"] else "pretrained"
    minutes = sum(run["minutes"] for of_seeds in runs.values() for run in of_seeds)
    parts.append(
        f"Always naming the largest class would make {100 * one['largest_class_share']:.1f} % right. "
        f"{one['data']['name']}: {len(one['classes'])} classes, {one['data']['train']} training and "
        f"{one['data']['test']} test images, each seed with a split of its own if the data has none; "
        f"{settings['backbone']} {weights}, {settings['image_size']} x {settings['image_size']} pixels, batches of "
        f"{settings['n_classes']} classes x {settings['n_samples']} images, {settings['epochs']} epochs, AdamW with "
        f"learning rate {settings['lr']:g} ({settings['backbone_lr']:g} for the backbone). {len(runs['api'])} seeds, "
        f"{minutes:.0f} minutes in all, last epoch, mean ± standard deviation over the seeds. {one['machine']}."
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = Command(__doc__, allow_abbrev=False)
    parser.add_argument("source", type=Path, help="as for train_own.py")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="runs of each method")
    about = "batches of plain cross-entropy, one or both (default: balanced)"
    parser.add_argument("--against", nargs="+", choices=("balanced", "shuffled"), default=["balanced"], help=about)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--table", type=Path, metavar="FILE", help="Markdown file (default: table.md in --out)")
    options, flags = parser.parse_known_args(arguments)
    methods = [*dict.fromkeys(options.against), "api"]
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        text = table(train_all(options.source, options.out, methods, options.seeds, flags))
        (options.table or options.out / "table.md").write_text(text, encoding="utf-8")
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"train_own.py ended with {error.returncode}") from None
    except OSError as error:
        raise SystemExit(f"{error.filename} cannot be read or written: {error.strerror}") from None
    print(f"\n{text}")


if __name__ == "__main__":
    main()
