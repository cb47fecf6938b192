"""Table and plot of what memory.py found, drawn anew from its JSON.

python benchmarks/memory_report.py benchmarks/results/amd-epyc-cpu-2026-11-24-memory.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from memory_step import Way
from tables import origin_line

GIB = 2**30
COLOURS = {
    "whole batch": "#1d3557", "gradient checkpointing": "#8d6a9f", "chunks of 30": "#b5172f", "chunks of 15": "#e07a1f",
    "chunks of 8": "#3a8f5c", "chunks of 4": "#2a9dc0",
}  # fmt: skip
Rows = list[dict[str, Any]]


def way_of(row: dict[str, Any]) -> Way:
    return Way(row["chunk_size"], row["checkpointing"], row["amp"])


def by_way(rows: Rows) -> dict[Way, dict[int, Any]]:
    """For each way what was found at each batch size."""
    found: dict[Way, dict[int, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["amp"] != "fp32", list(COLOURS).index(way_of(row).name))):
        found.setdefault(way_of(row), {})[row["batch"]] = row["found"]
    return found


def gib(amount: float) -> str:
    return f"{amount / GIB:.2f}" if amount < 10 * GIB else f"{amount / GIB:.1f}"


def grid(rows: Rows, show: Callable[[Way, int, Any], str]) -> str:
    """A table with a row for each way and a column for each batch size."""
    batches = sorted({row["batch"] for row in rows})
    lines = ["| precision | way | " + " | ".join(map(str, batches)) + " |", "| --- | --- |" + " ---: |" * len(batches)]
    for way, found in by_way(rows).items():
        cells = [show(way, batch, found[batch]) if batch in found else "" for batch in batches]
        lines.append(f"| {way.amp} | {way.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_table(result: dict[str, Any], given: int | None) -> str:
    """For each size of GPU chunk size and kept chunks that were picked, what they take, and what is recomputed."""
    rows = [row for row in result["choices"] if row["given"] == given]
    titles = ["`chunk_size`", "`keep_chunks`", "peak, GiB", "recomputed", "time"]
    lines = [f"| GPU | float32: {' | '.join(titles)} | bfloat16 or float16: {' | '.join(titles)} |"]
    lines.append("| ---: |" + " ---: |" * 2 * len(titles))
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        cells = [
            " | ".join(_choice(row))
            for amp in ("fp32", "bf16")
            for row in rows
            if row["gpu"] == gpu
            if row["amp"] == amp
        ]
        lines.append(f"| {gpu} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice(row: dict[str, Any]) -> list[str]:
    if "needed" not in row:
        return ["does not fit", *4 * [""]]
    chunks = ["whole batch", ""] if row["chunk_size"] is None else [str(row["chunk_size"]), str(row["keep_chunks"])]
    return [*chunks, gib(row["needed"]), f"{row['recomputed']:.0%}", f"{row['time']:.2f}"]


def times_table(result: dict[str, Any]) -> str:
    """Median seconds of a step; and its ratio to the whole batch of the same round: median, least and most."""
    lines = ["| way | seconds | times the whole batch's | processor's seconds | times the whole batch's |"]
    lines += ["| --- | ---: | ---: | ---: | ---: |"]
    for row in result["times"]:
        cells = []
        for clock in ("seconds", "processor_seconds"):
            ratios = [one / whole for one, whole in zip(row[clock], result["times"][0][clock], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            cells += [f"{statistics.median(row[clock]):.2f}", ratio]
        lines.append(f"| {way_of(row).name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_report(result: dict[str, Any]) -> str:
    """All tables, each with what its figures are."""
    estimated = by_way(result["small_estimated"])
    large, small, timed = (
        f"{result[name]['backbone']}, {result[name]['image_size']} x {result[name]['image_size']} pixels"
        for name in ("large", "small", "timed")
    )
    sections = {
        f"{large}: estimated": (
            "GiB, over batch size; from fake tensors, not measured on a GPU. Parameters, gradients, "
            "momentum, head and loss are in; the CUDA context, workspaces of cuDNN and fragmentation are not."
        ),
        "": grid(result["estimated"], lambda way, batch, found: gib(found)),
        f"{large}, on a GPU: measured": _on_gpu(result),
        f"{large}, chunk sizes for GPUs: estimated": (
            f"Batch of {result['large']['gpu_batch']}; what `pick_chunk_size` picks, with 15 % of the memory left free "
            "for what the estimate can't know. Recomputed is the share of the images that run through the backbone a "
            "second time; time that of a step over the whole batch at once, if a forward pass is a third of it and the "
            f"GPU is busy.\n\n{settings_table(result, None)}\n\nWith chunks of {result['large']['given']}:\n\n"
            f"{settings_table(result, result['large']['given'])}"
        ),
        f"{small}, on the CPU: measured": (
            "GiB by which a step raises the resident set of a fresh process, in brackets the estimate.\n\n"
            + grid(result["resident"], lambda way, batch, found: f"{gib(found)} ({gib(estimated[way][batch])})")
        ),
        f"{timed}, time of a step on the CPU: measured": (
            f"Batch of {result['timed']['batches'][0]}, float32; {len(result['times'][0]['seconds'])} rounds of all "
            "ways in turn. Medians, and ratios within a round with their range; other work on the machine stretches "
            f"the seconds that pass, and the processor's less.\n\n{times_table(result)}"
        ),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in sections.items())
    return f"# Peak memory of a training step\n\n{origin_line(result['origin'])}\n\n{body}"


def _on_gpu(result: dict[str, Any]) -> str:
    if result["cuda"] is None:
        return "Not yet measured."

    def show(way: Way, batch: int, found: dict[str, Any] | None) -> str:
        return f"{gib(found['allocated'])} / {gib(found['reserved'])}, {found['seconds']:.2f} s" if found else "-"

    return f"GiB allocated / reserved, and seconds of a step; -: out of memory.\n\n{grid(result['cuda'], show)}"


def draw(result: dict[str, Any], file: Path) -> None:
    """Memory over batch size: both precisions estimated for a GPU, and the CPU's measurements on their estimates."""
    figure, panels = plt.subplots(1, 3, figsize=(14.5, 5), layout="constrained")
    panels[1].sharey(panels[0])
    large, small = result["large"], result["small"]
    size = f"{large['image_size']} × {large['image_size']} px"
    for axes, amp, name in zip(panels, ("fp32", "bf16"), ("float32", "bfloat16"), strict=False):
        rows = [row for row in result["estimated"] if row["amp"] == amp]
        lines(axes, rows, f"{large['backbone']}, {size}, {name}\nestimated, not measured")
        for gpu in (11, 24, 80):
            axes.axhline(gpu, color="gray", linewidth=0.8, linestyle=":", zorder=0)
            axes.annotate(
                f"{gpu} GB", (axes.get_xlim()[0], gpu), (3, 2), textcoords="offset points", color="gray", fontsize=8
            )
    lines(
        panels[2],
        result["small_estimated"],
        f"{small['backbone']}, {small['image_size']} × {small['image_size']} px, float32, on a CPU\n"
        "circles: measured; lines: estimated",
    )
    for way, found in by_way(result["resident"]).items():
        panels[2].plot(list(found), [peak / GIB for peak in found.values()], "o", color=COLOURS[way.name], markersize=6)
    panels[0].set_ylabel("peak memory of a training step (GiB)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def lines(axes: Axes, rows: Rows, title: str) -> None:
    """A line for each way, named at its end."""
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for way, found in by_way(rows).items():
        colour = COLOURS[way.name]
        axes.plot(list(found), [peak / GIB for peak in found.values()], color=colour, linewidth=1.8)
        end = (batches[-1], found[batches[-1]] / GIB)
        axes.annotate(way.name, end, (6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
    axes.set_xlim(batches[0] / 1.15, batches[-1] * 4.5)  # room for the names
    axes.set_xticks(batches, map(str, batches))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("batch size (images)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def write_report(file: Path) -> None:
    """The table and the plot beside the JSON file."""
    result = json.loads(file.read_text())
    file.with_suffix(".md").write_text(make_report(result) + "\n")
    draw(result, file.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="file that memory.py wrote")
    write_report(parser.parse_args().json)


if __name__ == "__main__":
    main()
