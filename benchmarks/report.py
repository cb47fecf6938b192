"""Draws tables and plots from the files in benchmarks/results: into README.md, benchmarks/README.md, and beside them.

    python benchmarks/report.py

Of each kind of device the newest file of run.py counts; what stands between the markers of the documents is written
anew. A file of step_memory.py gets a document, and where it has estimates a plot, of its own name. A file has parts, a
part points, a point a case and sides: of each what was measured, or why nothing was.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KINDS = {"cpu": "CPU", "cuda": "GPU"}
LIMIT, AUTO, GRAPH, PUBLISHED = "x @ x.T", "ours, auto", "ours, CUDA graph", "published method"
WHOLE, CHECKPOINTING = "the whole batch at once", "gradient checkpointing"
PARTS = {
    "mining": "Pair mining", "head": "Head and loss", "train_step": "Training step", "chunks": "Step in chunks",
    "estimated": "Memory of a step, all in all: estimated",
    "choices": "What `pick_chunk_size` picks, with 15 % of the memory left free",
    "resident": "Memory of a step on the CPU, all in all",
}  # fmt: skip
NONE, MIB = "not yet measured", 2**20
STYLES: dict[str, dict[str, Any]] = {
    LIMIT: {"color": "black", "linestyle": "--"},
    AUTO: {"color": "#1f6fc4", "linewidth": 7, "alpha": 0.3, "marker": ""},
}
Found = Mapping[str, Any]
Show = Callable[..., object]


def load(file: Path) -> dict[str, Any]:
    """A file of measurements; one of an older script as if today's had written it."""
    found: dict[str, Any] = json.loads(file.read_text())
    if "points" in found:
        found["chunks"] = [{**point, "sides": point["ways"]} for point in found["points"]]
    if "large" in found:
        whole = found["times"][0]["seconds"]
        for row, other in zip(found["resident"], found["small_estimated"], strict=True):
            row["estimate"] = other["found"]
        for part, problem, side_of in (
            ("times", "timed", lambda row: {
                "seconds": spread(row["seconds"]), "rounds": len(whole),
                "ratio": spread(one / other for one, other in zip(row["seconds"], whole, strict=True)),
            }),
            ("estimated", "large", lambda row: {"memory": row["found"]}),
            ("resident", "small", lambda row: {"memory": row["found"], "estimate": row["estimate"]}),
            ("choices", "large", _choice),
        ):  # fmt: skip
            found[part] = _gather(found[problem], found[part], side_of)
        found["chunks"] = found.pop("times")
    return found


def _gather(problem: Found, rows: Sequence[Found], side_of: Callable[[Found], Found]) -> list[dict[str, Any]]:
    """Points of rows that hold one side each."""
    points: dict[Any, dict[str, Any]] = {}
    for row in rows:
        batch, dtype = row.get("batch", 120), {"fp32": "float32", "bf16": "bfloat16"}[row["amp"]]
        case = {"backbone": problem["backbone"], "pixels": problem["image_size"], "batch": batch, "dtype": dtype}
        case |= {"chunk": row["given"] or 0} if "given" in row else {}
        way = f"chunks of {row['chunk_size']}" if row.get("chunk_size") else WHOLE
        way = f"{row['gpu']} GB" if "gpu" in row else CHECKPOINTING if row["checkpointing"] else way
        points.setdefault(tuple(case.values()), {**case, "sides": {}})["sides"][way] = side_of(row)
    return list(points.values())


def _choice(row: Found) -> Found:
    if "needed" not in row:
        return {"absent": "out of memory"}
    kept = f", {row['keep_chunks']} kept" if "keep_chunks" in row else ""
    return {**row, "chosen": f"{row['chunk_size']}{kept}" if row["chunk_size"] else WHOLE, "memory": row["needed"]}


def newest(folder: Path) -> dict[str, Found | None]:
    """For each kind of device what run.py measured last."""
    results: dict[str, Found | None] = dict.fromkeys(KINDS)
    for found in sorted(map(load, folder.glob("*.json")), key=lambda found: found["origin"]["date"]):
        if not found.get("quick") and "mining" in found:
            results[found["origin"]["type"]] = found
    return results


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles, to five digits."""
    known = list(values)
    low, median, high = statistics.quantiles(known, n=4, method="inclusive") if len(known) > 1 else 3 * known
    return {name: float(f"{value:.5g}") for name, value in (("low", low), ("median", median), ("high", high))}


def table(titles: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """In Markdown; so many columns are texts."""
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (titles, rule, *rows))


def number(value: float, like: float | None = None) -> str:
    """Three digits, or as many decimals as a number like that has."""
    size = abs(value if like is None else like)
    return f"{value:,.{2 if size < 10 else 1 if size < 100 else 0}f}"


def time_of(side: Found, key: str) -> str:
    """Median, half the distance of the quartiles (a single round has none), ratio, and what is not as it should be."""
    low, median, high = (1000 * side[key][name] for name in ("low", "median", "high"))
    shown = number(median) + (f" ±{number((high - low) / 2, median)}" if side["rounds"] > 1 else "")
    shown += f" ({side['ratio']['median']:.3f})" if "ratio" in side else ""
    shown += f", {side['agreement']:.0%} right" if side.get("agreement", 1) < 1 else ""
    return shown + (f", {side['syncs']} waits" if side.get("syncs") else "")


def ratio(side: Found, key: str = "ratio", digits: int = 2) -> str:
    """Median and quartiles; a single round has none."""
    shown = {name: f"{value:.{digits}f}" if value >= 0.1 else f"{value:.2g}" for name, value in side[key].items()}
    return ("{median} [{low}, {high}]" if side["rounds"] > 1 else "{median}").format(**shown)


def mebibytes(side: Found, key: str) -> str:
    return number(side[key] / MIB)


# What a side may have: a title, and how it is shown.
QUANTITIES: dict[str, tuple[str, Show]] = {
    "seconds": ("Milliseconds; in brackets the ratio to the side with 1.000, within a round", time_of),
    "over all kept": ("Ratio to the time of all chunks kept", ratio),
    "chosen": ("Chunk size", lambda side, key: side[key]),
    "time": ("Time over that of the whole batch, on paper", lambda side, key: f"{side[key]:.2f}"),
    "saved": ("Kept for the backward pass, MiB", mebibytes),
    "memory": ("Memory at most, MiB", mebibytes),
    "estimate": ("Memory by estimate, MiB", mebibytes),
}


def cell(side: Found, key: str, show: Show) -> object:
    """What is shown; without a figure why there is none, in what the reason begins with."""
    if key in side:
        return show(side, key)
    word = side.get("absent" if "absent" in side else f"{key} absent", "—").split(":")[0]
    return word if word in ("—", "out of memory", "skipped", "not available") else "failed"


def tables(points: Sequence[Found]) -> str:
    """A table for each quantity, with a row for each point and a column for each side."""
    reached = [point for point in points if any("absent" not in side for side in point["sides"].values())]
    fields = [key for key, value in points[0].items() if isinstance(value, str | int)]
    same = [key for key in fields if len({point.get(key) for point in points}) == 1]
    shown = [key for key in fields if key not in same] or fields[:1]
    parts = [", ".join(f"{key} {points[0][key]}" for key in same) + "."] if same else []
    for key, (title, show) in QUANTITIES.items():
        names = dict.fromkeys(name for point in reached for name, side in point["sides"].items() if key in side)
        some = [point for point in reached if any(key in side for side in point["sides"].values())]
        rows = []
        for point in some:
            cells = (cell(point["sides"].get(name, {}), key, show) for name in names)
            rows.append([*(point.get(field, "") for field in shown), *cells])
        if rows:
            parts += [f"{title}:", table([*shown, *names], rows, len(shown))]
    if notes := _notes(points, reached, shown):
        parts += [f"Without a figure ({'/'.join(shown)}):", notes]
    return "\n\n".join(parts)


def _notes(points: Sequence[Found], reached: Sequence[Found], fields: Sequence[str]) -> str:
    """Every reason with the side and the points that it concerns."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for point in points:
        for name, side in point["sides"].items():
            if "absent" in side:
                key = (name, side["absent"]) if point in reached else ("all", "not reached in the time there was")
                found.setdefault(key, {})["/".join(str(point.get(field, "")) for field in fields)] = None
    return "\n".join(
        f"- {name}, {'always' if len(where) == len(reached) else ', '.join(where)}: {why}"
        for (name, why), where in found.items()
    )


def origin_line(origin: Found) -> str:
    """Where and when a file's figures were measured, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    where = f"{origin['device']}, {origin['cores']} cores, {origin['threads']} threads"
    if origin["type"] == "cuda":
        where = (
            f"{origin['device']} (capability {origin['capability']}, {origin['device memory'] / 2**30:.0f} GiB, "
            f"driver {origin['driver']}, CUDA {origin['cuda']}), {origin['cores']} cores"
        )
    return f"{where}, Python {origin['python']}, {versions}; {origin['date']}."


def section(found: Found | None) -> str:
    """All that a file holds."""
    if found is None:
        return f"{NONE.capitalize()}."
    parts = [origin_line(found["origin"])]
    parts += [f"**{name} failed**: {error}" for name, error in found.get("errors", {}).items()]
    for part, title in PARTS.items():
        if points := found.get(part):
            plot = [f"![Mining over the size of the batch]({picture(found)})"] if part == "mining" else []
            parts += [f"### {title}", *plot, tables(points)]
    return "\n\n".join(parts)


def picture(found: Found) -> str:
    """Seen from the folder of the benchmarks."""
    return f"results/mining-{found['origin']['type']}.png"


def summary(results: Mapping[str, Found | None]) -> str:
    """The README's small table: a column for each kind of device, a line for each question."""
    small, large = ({"size": size, "dim": 2048, "dtype": "float32", "keys": 0} for size in (120, 8192))
    head, step = {"classes": 200, "mining": False, "dtype": "float32"}, "cross-entropy alone"
    lines: list[Any] = [
        ("mining, B=120, D=2048, float32: ours / published method", "mining", small, AUTO, PUBLISHED, "seconds"),
        ("the same, B=8192: ours / published method", "mining", large, AUTO, PUBLISHED, "seconds"),
        ("the same, B=8192: ours / the one product x @ x.T", "mining", large, AUTO, LIMIT, "seconds"),
        ("head and loss, forward and backward: ours / published", "head", head, "ours", "published", "seconds"),
        ("the same: what is kept for the backward pass", "head", head, "ours", "published", "saved"),
        ("whole training step: ours / cross-entropy alone", "train_step", {}, "ours", step, "seconds"),
        ("whole training step: published / cross-entropy alone", "train_step", {}, "published", step, "seconds"),
    ]

    def answer(found: Found | None, part: str, wanted: Found, *compared: str) -> str:
        points = [point for point in (found or {}).get(part, []) if wanted.items() <= {"keys": 0, **point}.items()]
        return _versus(points[0], *compared) if points else NONE if found is None else "—"

    titles = [KINDS[kind] + (f": {found['origin']['device']}" if found else "") for kind, found in results.items()]
    rows = [[title, *(answer(found, *line) for found in results.values())] for title, *line in lines]
    return table(["", *titles], rows)


def _versus(point: Found, ours: str, theirs: str, key: str) -> str:
    """A ratio with what it is of; of times within a round."""
    one, other = point["sides"][ours], point["sides"][theirs]
    if key not in one or key not in other:
        return str(cell(one if key not in one else other, key, mebibytes))
    if key == "saved":
        return f"{one[key] / other[key]:.2f} ({mebibytes(one, key)} / {mebibytes(other, key)} MiB)"
    times = " / ".join(number(1000 * side[key]["median"]) for side in (one, other))
    shown = ratio(other, "ours / this") if "ours / this" in other else ratio(one, digits=3)
    step = f"; {point['backbone']}, {point['batch']} x {point['pixels']}²" if "backbone" in point else ""
    return f"{shown} ({times} ms{step})"


def blocks(results: Mapping[str, Found | None]) -> dict[str, dict[str, str]]:
    """For each document what is to stand between its markers."""
    short, measured = [summary(results)], [found for found in results.values() if found is not None]
    if measured:
        short.append(f"![Time and memory of mining over the size of the batch](benchmarks/{picture(measured[-1])})")
    short += [f"{KINDS[found['origin']['type']]}: {origin_line(found['origin'])}" for found in measured]
    return {
        "README.md": {"summary": "\n\n".join(short)},
        "benchmarks/README.md": {kind: section(found) for kind, found in results.items()},
    }


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The document with its marked blocks written anew."""
    for name, block in blocks.items():
        start, end = f"<!-- benchmarks: {name} -->\n", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(f"expected markers {start.strip()} and {end} once each")
        text = text.partition(start)[0] + start + block + "\n" + end + text.partition(end)[2]
    return text


def draw(points: Sequence[Found], over: str, title: str, file: Path) -> None:
    """Time and memory over the size of the batch, both axes logarithmic; a row of plots for each dtype."""
    import matplotlib

    matplotlib.use("Agg")  # no window, also where there is a screen
    import matplotlib.pyplot as plt

    units: dict[str, tuple[str, Callable[[Any], float]]] = {
        "seconds": ("milliseconds", lambda value: 1000 * value["median"]), "memory": ("MiB", lambda value: value / MIB)
    }  # fmt: skip
    keys = [key for key in units if any(key in side for point in points for side in point["sides"].values())]
    points = [point for point in points if any(key in side for side in point["sides"].values() for key in keys)]
    counts = Counter(point["dtype"] for point in points)
    kinds = [kind for kind in counts if counts[kind] > 1] or list(counts)  # one size is no curve
    figure, grid = plt.subplots(
        len(kinds), len(keys), figsize=(11, 5 * len(kinds)), layout="constrained", squeeze=False
    )
    for axes, (kind, key) in zip(grid.flat, product(kinds, keys), strict=True):
        some = [point for point in points if point["dtype"] == kind]
        unit, scale = units[key]
        for name in dict.fromkeys(name for point in some for name in point["sides"]):
            known = {point[over]: scale(side[key]) for point in some if (side := point["sides"].get(name, {})).get(key)}
            axes.plot(known.keys(), known.values(), **{"label": name, "marker": ".", **STYLES.get(name, {})})
        sizes = sorted({point[over] for point in some})
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=unit, title=kind)
        axes.set_xticks(sizes, map(str, sizes), rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color="dimgrey")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def report(root: Path) -> None:
    """Write documents and pictures below `root`."""
    folder = root / "benchmarks"
    results = newest(folder / "results")
    for found in results.values():
        if found is not None and found["mining"]:
            wide = max(point["dim"] for point in found["mining"])
            points = [point for point in found["mining"] if point["dim"] == wide and not point.get("keys")]
            draw(points, "size", f"Mining a batch, D={wide}, {found['origin']['device']}", folder / picture(found))
    for document, contents in blocks(results).items():
        file = root / document
        file.write_text(fill(file.read_text(), contents))
    for file in (folder / "results").glob("*.json"):
        found = load(file)
        if "chunks" in found:
            file.with_suffix(".md").write_text(f"# Time and memory of a training step\n\n{section(found)}\n")
        if rows := found.get("estimated"):
            draw(rows, "batch", f"Memory of a step by estimate, {rows[0]['backbone']}", file.with_suffix(".png"))


if __name__ == "__main__":
    report(ROOT)
