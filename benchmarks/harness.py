"""Runs benchmarks: sides of a comparison take turns, cases share the time there is, a file keeps the figures."""

import argparse
import json
import os
import platform
import random
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from report import section, spread
from torch.utils.benchmark import timer  # it waits for the device first
from tqdm import tqdm

PACKAGES = ("triton", "timm", "numpy", "pytorch-metric-learning", "apinet-head")
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
LEAST, MOST = 3, 200  # rounds
LONG = 4  # times as long as a whole case should take: so long a round is not repeated
Point = dict[str, Any]
Measure = Callable[[Any], Point]


class Part(NamedTuple):
    """A benchmark: its cases, and what makes of device, seconds and cases a function that measures one of them."""

    cases: Callable[[torch.device, bool], Sequence[Any]]
    begin: Callable[[torch.device, float, Sequence[Any]], Measure]
    seconds: float = 0


def evenly(measure_one: Callable[[Any, torch.device, float], Point]) -> Callable[..., Measure]:
    """The cases have equal shares of the seconds."""
    return lambda device, seconds, cases: lambda case: measure_one(case, device, seconds / len(cases))


class Turns(NamedTuple):
    """Of every side the seconds of each round and what it first returned; of those that have none, the reason."""

    seconds: dict[str, list[float]]
    absent: dict[str, str]
    results: dict[str, Any]

    def ratio(self, side: str, base: str) -> dict[str, float]:
        """Median and quartiles of the ratio of two sides' times in the same round."""
        return spread(a / b for a, b in zip(self.seconds[side], self.seconds[base], strict=True))

    def summary(self, base: str) -> dict[str, Point]:
        """Of each side median and quartiles of its seconds, and of its ratio to the side `base`."""
        found: dict[str, Point] = {}
        for name, values in self.seconds.items():
            found[name] = {"seconds": spread(values), "rounds": len(values)}
            if base in self.seconds:
                found[name]["ratio"] = self.ratio(name, base)
        return found | {name: {"absent": why} for name, why in self.absent.items()}


def take_turns(calls: Mapping[str, Callable[[], object]], seconds: float, alone: float | None = None) -> Turns:
    """Call all sides in turn, in about so many seconds; a side that fails in the first round stays out of the others.

    The first round warms up, and at least three more are measured. But a first round of more seconds than `alone`
    (by default four times `seconds`) is measured itself, and is the only one.
    """
    taken: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    results: dict[str, Any] = {}
    for name in 2 * list(calls) if torch.cuda.is_available() else calls:  # a GPU loads and compiles kernels first
        try:
            start = timer()
            results[name] = calls[name]()
            taken[name] = [timer() - start]
        except Exception as error:  # whatever a side dies of, it is what there is to say about it
            absent[name] = reason(error)
    round_takes = sum(first for (first,) in taken.values())
    if not taken or round_takes > (LONG * seconds if alone is None else alone):
        return Turns(taken, absent, results)
    names, order = list(taken), random.Random(0)
    taken = {name: [] for name in names}
    for _ in range(min(MOST, max(LEAST, int(seconds / round_takes)))):
        order.shuffle(names)  # what a side leaves in caches and allocators may help or harm the one that follows
        for name in names:
            start = timer()
            calls[name]()
            taken[name].append(timer() - start)
    return Turns(taken, absent, results)


def reason(error: Exception) -> str:
    """Why a side has no figure, in a line."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"not available: {text[:300]}" if isinstance(error, ValueError) else f"{type(error).__name__}: {text[:300]}"


def measure(
    parts: Mapping[str, Part], device: torch.device, quick: bool = False, seconds: float | None = None, only: str = ""
) -> dict[str, Any]:
    """All that goes into a file, of cases with the text `only` in their names; a case that fails leaves its error."""
    factor = (1 / 15 if quick else 1) if seconds is None else seconds / sum(part.seconds for part in parts.values())
    found: dict[str, Any] = {"origin": origin(device), "quick": quick, "errors": {}}
    for name, part in parts.items():
        found[name] = []
        cases = [case for case in part.cases(device, quick) if only in f"{name}, {case}"]
        measure_one: Measure | None = None
        for case in tqdm(cases, desc=name, unit="case"):
            try:
                measure_one = measure_one or part.begin(device, factor * part.seconds, cases)
                found[name].append(measure_one(case))
            except Exception as error:  # the other cases are worth their time nevertheless
                traceback.print_exc()
                found["errors"][f"{name}, {case}"] = reason(error)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def main(text: str | None, parts: Mapping[str, Part], output: Path | None = None, ending: str = "") -> None:
    """The command line of a benchmark: measures, prints the tables, and writes DEVICE-DATE`ending`.json."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--seconds", type=float, help="of measuring, for all of it (default: minutes)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases that have this in their names")
    parser.add_argument("--output", type=Path, default=output, help="folder for the file (default: %(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = measure(parts, device, options.quick, options.seconds, options.only)
    print(section(found))
    if options.output is not None:
        print(write_json(options.output, found, ending + "-quick" * options.quick))
    if found["errors"]:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in found["errors"].items()))


def origin(device: torch.device) -> dict[str, Any]:
    """Where figures come from: device, date, versions."""
    versions = {name: known[0].version for name in PACKAGES if (known := [*metadata.distributions(name=name)])}
    found: dict[str, Any] = {
        "device": _name(device), "type": device.type, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "memory": psutil.virtual_memory().total, "date": str(date.today()),
        "python": platform.python_version(), "versions": {"torch": torch.__version__, **versions},
    }  # fmt: skip
    if device.type == "cuda":
        from torch.utils import collect_env  # where there is no GPU, importing it warns

        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": collect_env.get_nvidia_driver_version(collect_env.run), "cuda": torch.version.cuda,
            "device memory": properties.total_memory, "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    return found


def free_memory() -> int:
    """Bytes that the host can give without danger: where nothing is left, the system ends processes."""
    return int(0.8 * psutil.virtual_memory().available)


def write_json(folder: Path, found: Mapping[str, Any], ending: str = "") -> Path:
    """Write what was found, with its `origin`, to a file named by device and date."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", found["origin"]["device"].lower()).strip("-")
    file = folder / f"{device}-{found['origin']['date']}{ending}.json"
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return file


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else None
    return f"{found[1].strip() if found else platform.machine()} CPU"
