"""Train API-Net in small batches with and without a memory of past ones, with shared seeds and budget.

Writes one table (Markdown, CSV). Finished runs are kept: the same command goes on where it stopped.
"""

import argparse
import os
from pathlib import Path

from ablate import Row, make_table, train_rows, write_csv
from workbench.datasets.birds_cache import open_data
from workbench.run_folder import write_text
from workbench.settings import parse
from workbench.sweep import origin

SMALL_BATCHES = ["--n-classes", "8", "--n-samples", "2", "--epochs", "60"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Further flags go to train_cub.py, after {' '.join(SMALL_BATCHES)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 256, 512], metavar="N", help="memories (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/memory"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of the table (default: that of the runs)")
    options, flags = parser.parse_known_args()
    flags = [*SMALL_BATCHES, *flags]

    settings = parse(flags)
    data = open_data(settings)  # drawn once, before the runs would all do it
    part = f"memory, batches of {settings.n_classes} classes x {settings.n_samples} images"
    rows = [Row(part, "none"), *(Row(part, str(size), ("--memory", str(size))) for size in options.sizes)]
    results = train_rows(options.runs, rows, options.seeds, options.jobs, flags)

    output = options.output or options.runs
    output.mkdir(parents=True, exist_ok=True)
    table = f"{make_table(rows, results)}\n\n{origin(data, settings, results)}\n"
    write_text(output / "memory.md", table)
    write_csv(output / "memory.csv", rows, results)
    print(f"\n{table}\n{output}/memory.md, .csv")


if __name__ == "__main__":
    main()
