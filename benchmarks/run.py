"""Measures everything on the machine at hand, in less than ten minutes, and writes one file.

    python benchmarks/run.py          # then report.py, which draws tables and plots from the file
    python benchmarks/run.py --quick  # less than a minute, for a look: report.py leaves its file out

Nothing else should run on the machine meanwhile.
"""

import argparse
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import head
import mining
import torch
import train_step
from machine import ceilings, default_device, higher, origin, write_json
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


class Part(NamedTuple):
    """A benchmark: a module with `cases(device, quick)` and `points(cases, device, seconds)`, and its share of time."""

    module: ModuleType
    seconds: float
    quick_seconds: float


# memory.py joins them here.
PARTS = {
    "mining": Part(mining, 330, 20),
    "head": Part(head, 30, 4),
    "train_step": Part(train_step, 90, 8),
}
Plan = Mapping[str, tuple[ModuleType, Sequence[Any], float]]


def make_plan(device: torch.device, quick: bool = False, seconds: float | None = None) -> Plan:
    """The cases and the seconds of each part, which share `seconds` if given."""
    shares = {name: part.quick_seconds if quick else part.seconds for name, part in PARTS.items()}
    factor = 1 if seconds is None else seconds / sum(shares.values())
    return {
        name: (part.module, part.module.cases(device, quick), factor * shares[name]) for name, part in PARTS.items()
    }


def measure(plan: Plan, device: torch.device, quick: bool = False) -> dict[str, Any]:
    """All that goes into the file. A part that fails leaves its error there, and the points it had."""
    start = time.perf_counter()
    found: dict[str, Any] = {"origin": origin(device), "quick": quick, "errors": {}}
    dtypes = list(mining.DTYPES[device.type])
    with tqdm(total=2 + sum(len(cases) for _, cases, _ in plan.values()), desc="benchmarks", unit="point") as bar:
        bar.set_postfix_str("what the device reaches at best")
        before = ceilings(device, dtypes, quick)
        bar.update()
        for name, (module, cases, seconds) in plan.items():
            found[name] = []
            try:
                _fill(found[name], name, module, cases, device, seconds, bar)
            except Exception:  # the other parts are worth their time nevertheless
                found["errors"][name] = traceback.format_exc(limit=-1).strip().split("\n")[-1]
                traceback.print_exc()
        found["ceilings"] = higher(before, ceilings(device, dtypes, quick))
        bar.update()
    found["seconds"] = round(time.perf_counter() - start)
    return found


def _fill(
    points: list[Any], name: str, module: ModuleType, cases: Sequence[Any], device: torch.device, seconds: float,
    bar: "tqdm[Any]",
) -> None:  # fmt: skip
    measured = module.points(cases, device, seconds)
    for case in cases:
        bar.set_postfix_str(f"{name}: {case}")
        points.append(next(measured))
        bar.update()


def write(found: Mapping[str, Any], folder: Path) -> Path:
    """A file named by device and date."""
    return write_json(folder, found, "-quick" if found["quick"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--seconds", type=float, help="of measuring (default: 450)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the file (default: %(default)s)")
    options = parser.parse_args()
    plan = make_plan(options.device, options.quick, options.seconds)
    chosen = {name: part for name, part in plan.items() if options.only is None or name in options.only}
    found = measure(chosen, options.device, options.quick)
    print(f"{write(found, options.output)}, in {found['seconds']} s")
    if found["errors"]:
        raise SystemExit("\n".join(f"{name} failed: {error}" for name, error in found["errors"].items()))


if __name__ == "__main__":
    main()
