"""Mining over the size of the batch: time and memory of all sides, both axes logarithmic."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from miners import AUTO, GRAPH, LIMIT, PUBLISHED

STYLES: dict[str, dict[str, Any]] = {
    LIMIT: {"color": "black", "linestyle": (0, (4, 2)), "label": f"{LIMIT}, that one product alone"},
    AUTO: {"color": "#1f6fc4", "linewidth": 7, "alpha": 0.3, "label": "ours, auto: picks one of ours"},
    "ours, dense": {"color": "#6db3f2"},
    "ours, tiled": {"color": "#1f6fc4"},
    "ours, triton": {"color": "#0b2e59"},
    GRAPH: {"color": "#0aa5a0"},
    PUBLISHED: {"color": "#d1495b"},
    "dense torch": {"color": "#a47148"},
    "torch.cdist": {"color": "#e09f3e"},
    "pytorch-metric-learning": {"color": "#8e5ea2"},
}
CLOSE = 0.12  # of the width of a plot: nearer to each other, two numbers below it would touch


def draw_mining(points: Sequence[Mapping[str, Any]], device: str, file: Path) -> None:
    """Time and memory side by side, at the widest D that was measured; a row of plots for each dtype."""
    points = [point for point in points if any("seconds" in side for side in point["sides"].values())]
    sizes = {
        dtype: {point["size"] for point in points if point["dtype"] == dtype}
        for dtype in dict.fromkeys(point["dtype"] for point in points)
    }
    # One size is no curve.
    dtypes = [dtype for dtype in sizes if len(sizes[dtype]) > 1] or list(sizes)
    width = max(point["dim"] for point in points)
    figure, grid = plt.subplots(
        len(dtypes), 2, figsize=(11, 1.2 + 3.9 * len(dtypes)), layout="constrained", squeeze=False
    )  # fmt: skip
    for (time, memory), dtype in zip(grid, dtypes, strict=True):
        some = [point for point in points if (point["dim"], point["dtype"]) == (width, dtype)]
        _draw(time, some, "time", 1000, "milliseconds")
        _draw(memory, some, "memory", 1 / 2**20, "MiB beyond the batch itself")
        time.set_title(f"Time to mine a batch, D={width}, {dtype}", loc="left", fontsize=12)
        memory.set_title(f"Memory at most, D={width}, {dtype}", loc="left", fontsize=12)
    lines: dict[str, Any] = {}
    for axes in grid.flat:
        lines |= {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}
    lines["no further figure: see the tables"] = Line2D([], [], color="grey", marker="x", linestyle="none")
    figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=4, frameon=False, fontsize=10.5)
    figure.suptitle(device, x=0.01, ha="left", fontsize=11, color="dimgrey")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw(axes: Axes, points: Sequence[Mapping[str, Any]], quantity: str, scale: float, unit: str) -> None:
    sizes = [point["size"] for point in points]
    for name in points[0]["sides"]:
        values = [_value(point["sides"][name], quantity) for point in points]
        known = [(size, scale * value) for size, value in zip(sizes, values, strict=True) if value]
        if not known:
            continue
        style = {"linewidth": 1.7, "label": name} | STYLES.get(name, {"color": "grey"})
        axes.plot(*zip(*known, strict=True), marker="o" if name != AUTO else None, markersize=3.5, **style)
        if known[-1][0] < sizes[-1]:
            axes.plot(*known[-1], marker="x", markersize=9, markeredgewidth=1.8, color=style["color"])
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel=unit)
    axes.set_xticks(sizes, _numbers(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _value(side: Mapping[str, Any], quantity: str) -> float | None:
    if quantity == "memory":
        return side.get("memory")
    return side["seconds"]["median"] if "seconds" in side else None


def _numbers(sizes: Sequence[int]) -> list[str]:
    """What stands below the plot for each size, from the largest on; nothing where it would touch."""
    shown: list[int] = []
    for size in reversed(sizes):
        if not shown or math.log(shown[-1] / size) >= CLOSE * math.log(sizes[-1] / sizes[0]):
            shown.append(size)
    return [f"{size:,}" if size in shown else "" for size in sizes]
