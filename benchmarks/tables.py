"""Measured points as Markdown tables. A cell without a figure says why, in a word; the notes below say it in full."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from miners import AUTO, LIMIT, PUBLISHED

Point = Mapping[str, Any]
NONE = "not yet measured"


def origin_line(origin: Mapping[str, Any]) -> str:
    """Where and when a file's figures were measured, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    parts = [f"{origin['device']}", f"{origin['cores']} cores, {origin['threads']} threads"]
    if origin["type"] == "cuda":
        parts = [
            f"{origin['device']} (capability {origin['capability']}, {origin['device memory'] / 2**30:.0f} GiB, "
            f"driver {origin['driver']}, CUDA {origin['cuda']})", f"{origin['cores']} cores",
        ]  # fmt: skip
    return f"{', '.join(parts)}, Python {origin['python']}, {versions}; {origin['date']}."


def ceilings_line(ceilings: Mapping[str, Any]) -> str:
    flops = ", ".join(f"{value / 1e12:,.3g} TFLOP/s in {dtype}" for dtype, value in ceilings["flops"].items())
    return f"A large product reaches {flops}; a large copy {ceilings['bytes'] / 1e9:,.1f} GB/s, read and written."


def mining_tables(points: Sequence[Point], ceilings: Mapping[str, Any] | None = None) -> str:
    """Times, memory and agreement, for each dtype."""
    parts = []
    for dtype in dict.fromkeys(point["dtype"] for point in points):
        asked = [point for point in points if point["dtype"] == dtype]
        some = [point for point in asked if any("seconds" in side for side in point["sides"].values())] or asked
        parts += [f"Milliseconds, {dtype}; in brackets the ratio to {LIMIT} of the same round:", _times(some, ceilings)]
        if any("memory" in side for point in some for side in point["sides"].values()):
            parts += [f"Memory at most beyond the batch itself, MiB, {dtype}, D={_widest(some)}:", _memory(some)]
        parts += [f"What they find, {dtype}:", _findings(some)]
        if notes := _notes(some):
            parts += ["Without a figure:", notes]
        if missing := [(point["size"], point["dim"]) for point in asked if point not in some]:
            parts += [f"Not reached in the time there was: {_where(missing, asked)}."]
    return "\n\n".join(parts)


def head_table(points: Sequence[Point]) -> str:
    peak = any("memory" in side for point in points for side in point["sides"].values())
    titles = ["classes", "dtype", "pairs", "ours, ms", "published, ms", "time, ours / published"]
    titles += ["kept for the backward pass, MiB: ours", "published", "ours / published"]
    titles += ["peak, MiB: ours", "published"] if peak else []
    rows = []
    for point in points:
        ours, theirs = (point["sides"][name] for name in ("ours", "published"))
        cells = [str(point["classes"]), point["dtype"], "mined" if point["mining"] else "given"]
        cells += [_ms(ours), _ms(theirs), _ratio(ours), _mib(ours, "saved"), _mib(theirs, "saved")]
        both = "saved" in ours and "saved" in theirs
        cells.append(f"{ours['saved'] / theirs['saved']:.2f}" if both else "—")
        rows.append(cells + ([_mib(ours, "memory"), _mib(theirs, "memory")] if peak else []))
    return _table(titles, rows, left=3)


def step_table(points: Sequence[Point]) -> str:
    titles = ["backbone", "batch", "dtype", "cross-entropy alone, ms", "API-Net, published", "API-Net, ours"]
    rows = []
    for point in points:
        batch = f"{point['batch']} x {point['pixels']}²"
        batch += f", chunks of {point['chunk']}" if point["chunk"] < point["batch"] else ""
        sides = point["sides"]
        cells = [point["backbone"], batch, point["dtype"], _ms(sides["cross-entropy alone"])]
        rows.append([*cells, _overhead(sides["published"]), _overhead(sides["ours"])])
    return _table(titles, rows, left=3)


def summary(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The README's small table: a column for each kind of device, a line for each question."""
    titles = ["", *(f"{kind}: {found['origin']['device']}" if found else kind for kind, found in results.items())]
    lines: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
        "mining, B=120, D=2048, float32: ours / published method": lambda found: _mining_ratio(found, 120, PUBLISHED),
        "the same, B=8192: ours / published method": lambda found: _mining_ratio(found, 8192, PUBLISHED),
        "the same, B=8192: ours / the one product x @ x.T": lambda found: _mining_ratio(found, 8192, LIMIT),
        "head and loss, forward and backward: ours / published, time": _head_time,
        "the same: what is kept for the backward pass": _head_memory,
        "whole training step: ours over cross-entropy alone": lambda found: _step_overhead(found, "ours"),
        "whole training step: published over cross-entropy alone": lambda found: _step_overhead(found, "published"),
    }
    rows = [
        [title, *(NONE if found is None else make(found) or "—" for found in results.values())]
        for title, make in lines.items()
    ]
    return _table(titles, rows)


def _times(points: Sequence[Point], ceilings: Mapping[str, Any] | None) -> str:
    names = _measured(points)
    titles = ["B", "D", *names] + (["ours, auto: share of what the device reaches"] if ceilings else [])
    rows = []
    for point in points:
        sides = [point["sides"][name] for name in names]
        cells = [str(point["size"]), str(point["dim"])]
        cells += [_ms(side) + (f" ({side['ratio']['median']:.2f})" if "ratio" in side else "") for side in sides]
        rows.append(cells + ([_share(point, ceilings)] if ceilings else []))
    return _table(titles, rows, left=0)


def _share(point: Point, ceilings: Mapping[str, Any]) -> str:
    """The least time that the device would take for what mining cannot do without, as a share of what ours takes."""
    side, work = point["sides"][AUTO], point["least"]
    if "seconds" not in side:
        return "—"
    fastest = max(work["flops"] / ceilings["flops"][point["dtype"]], work["bytes"] / ceilings["bytes"])
    return f"{fastest / side['seconds']['median']:.0%}"


def _memory(points: Sequence[Point]) -> str:
    names = _measured(points)
    wide = [point for point in points if point["dim"] == _widest(points)]
    rows = [[str(point["size"]), *(_mib(point["sides"][name], "memory") for name in names)] for point in wide]
    return _table(["B", *names], rows, left=0)


def _findings(points: Sequence[Point]) -> str:
    """How many partners are those of float64, and how often the host waits."""
    rows = []
    for name in _measured(points):
        sides = [point["sides"][name] for point in points]
        shares = [side["agreement"] for side in sides if "agreement" in side]
        waits = [side["syncs"] for side in sides if "syncs" in side]
        if shares:
            rows.append([name, f"{min(shares):.2%}", f"{max(shares):.2%}", *([str(max(waits))] if waits else [])])
    titles = ["", "partners as in float64, lowest of all batches", "highest"]
    # Only a GPU is something to wait for.
    return _table(titles + ["waits of the host for the device"] * (len(rows[0]) - 3 if rows else 0), rows)


def _notes(points: Sequence[Point]) -> str:
    """Every reason once, with the sides and the batches that it concerns."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for point in points:
        reasons: dict[str, list[str]] = {}
        for name, side in point["sides"].items():
            if "absent" in side:
                reasons.setdefault(side["absent"], []).append(name)
        for why, names in reasons.items():
            sides = "all sides" if len(names) == len(point["sides"]) else "; ".join(names)
            found.setdefault((sides, why), []).append((point["size"], point["dim"]))
    return "\n".join(f"- {sides}, {_where(batches, points)}: {why}" for (sides, why), batches in found.items())


def _where(batches: Sequence[tuple[int, int]], points: Sequence[Point]) -> str:
    """Sizes, with their D where it isn't all of those that were to be measured."""
    if len(batches) == len(points):
        return "all batches"
    parts = []
    for size in dict.fromkeys(size for size, _ in batches):
        dims = [dim for of, dim in batches if of == size]
        all_of_them = len(dims) == sum(point["size"] == size for point in points)
        parts.append(f"B={size}" + ("" if all_of_them else f" at D={', '.join(map(str, dims))}"))
    return "; ".join(parts)


def _measured(points: Sequence[Point]) -> list[str]:
    """The sides with a figure at all; the others are in the notes."""
    return [name for name in points[0]["sides"] if any("seconds" in point["sides"][name] for point in points)]


def _widest(points: Sequence[Point]) -> int:
    return max(point["dim"] for point in points)


def _mining_ratio(found: Mapping[str, Any], size: int, base: str) -> str | None:
    for point in found["mining"]:
        if (point["size"], point["dim"], point["dtype"]) == (size, 2048, "float32"):
            ours, other = point["sides"][AUTO], point["sides"][base]
            if "ours / this" not in other:
                return _word(other if "absent" in other else ours)
            times = (_number(1000 * side["seconds"]["median"]) for side in (ours, other))
            return f"{_range(other['ours / this'], other['rounds'])} ({' / '.join(times)} ms)"
    return None


def _head(found: Mapping[str, Any]) -> Point | None:
    wanted = (200, False, "float32")
    return next((p for p in found["head"] if (p["classes"], p["mining"], p["dtype"]) == wanted), None)


def _head_time(found: Mapping[str, Any]) -> str | None:
    point = _head(found)
    if point is None:
        return None
    ours, theirs = (point["sides"][name] for name in ("ours", "published"))
    return f"{_ratio(ours)} ({_ms(ours)} / {_ms(theirs)} ms)"


def _head_memory(found: Mapping[str, Any]) -> str | None:
    point = _head(found)
    if point is None or any("saved" not in side for side in point["sides"].values()):
        return None
    ours, theirs = (point["sides"][name]["saved"] for name in ("ours", "published"))
    return f"{ours / theirs:.2f} ({ours / 2**20:.1f} / {theirs / 2**20:.1f} MiB)"


def _step_overhead(found: Mapping[str, Any], name: str) -> str | None:
    if not found["train_step"]:
        return None
    point = found["train_step"][0]
    return f"{_overhead(point['sides'][name])} ({point['backbone']}, {point['batch']} x {point['pixels']}²)"


def _ms(side: Mapping[str, Any]) -> str:
    """Median and half the distance of the quartiles; a single round has none."""
    if "seconds" not in side:
        return _word(side)
    low, median, high = (1000 * side["seconds"][name] for name in ("low", "median", "high"))
    return _number(median) + (f" ±{_number((high - low) / 2, median)}" if side["rounds"] > 1 else "")


def _ratio(side: Mapping[str, Any]) -> str:
    if "ratio" not in side:
        return _word(side)
    return _range(side["ratio"], side["rounds"])


def _range(values: Mapping[str, float], rounds: int) -> str:
    """Median and quartiles; a single round has none."""
    shown = {name: f"{value:.2f}" if value >= 0.1 else f"{value:.2g}" for name, value in values.items()}
    return ("{median} [{low}, {high}]" if rounds > 1 else "{median}").format(**shown)


def _overhead(side: Mapping[str, Any]) -> str:
    if "ratio" not in side:
        return _word(side)
    low, median, high = (100 * (side["ratio"][name] - 1) for name in ("low", "median", "high"))
    return f"{median:+.1f} %" + (f" [{low:+.1f}, {high:+.1f}]" if side["rounds"] > 1 else "")


def _mib(side: Mapping[str, Any], name: str) -> str:
    return _number(side[name] / 2**20) if name in side else _word(side)


def _word(side: Mapping[str, Any]) -> str:
    """Why there is no figure: what its reason begins with."""
    if "absent" not in side:
        return "not measured"
    word = side["absent"].split(":")[0]
    return word if word in ("out of memory", "skipped", "not available") else "failed"


def _number(value: float, like: float | None = None) -> str:
    """Three digits, or as many decimals as a number like that has."""
    size = abs(value if like is None else like)
    return f"{value:,.{2 if size < 10 else 1 if size < 100 else 0}f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["---:"] * (len(titles) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))
