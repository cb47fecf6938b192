"""Draws tables and plots from the files that run.py wrote: into README.md, benchmarks/README.md and benchmarks/results.

    python benchmarks/report.py

Of each kind of device the newest file counts. What stands between the markers of the documents is written anew.
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plots import draw_mining
from tables import NONE, ceilings_line, head_table, mining_tables, origin_line, step_table, summary

ROOT = Path(__file__).parents[1]
KINDS = {"cpu": "CPU", "cuda": "GPU"}
Found = Mapping[str, Any]


def newest(folder: Path, quick: bool = False) -> dict[str, Found | None]:
    """For each kind of device what was measured last."""
    results: dict[str, Found | None] = dict.fromkeys(KINDS)
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for found in sorted(files, key=lambda found: found["origin"]["date"]):
        if found.get("quick") == quick:  # other scripts' files have no such entry
            results[found["origin"]["type"]] = found
    return results


def blocks(results: Mapping[str, Found | None]) -> dict[str, dict[str, str]]:
    """For each document what is to stand between its markers."""
    short = [summary({KINDS[kind]: found for kind, found in results.items()})]
    measured = {kind: found for kind, found in results.items() if found is not None}
    if measured:
        kind = "cuda" if "cuda" in measured else "cpu"
        short.append(f"![Time and memory of mining over the size of the batch](benchmarks/{picture(kind)})")
    short += [f"{KINDS[kind]}: {origin_line(found['origin'])}" for kind, found in measured.items()]
    return {
        "README.md": {"summary": "\n\n".join(short)},
        "benchmarks/README.md": {kind: section(kind, found) for kind, found in results.items()},
    }


def picture(kind: str) -> str:
    """Seen from the folder of the benchmarks."""
    return f"results/mining-{kind}.png"


def section(kind: str, found: Found | None) -> str:
    """All that was measured on one kind of device."""
    if found is None:
        return f"{NONE.capitalize()}."
    parts = [origin_line(found["origin"]), ceilings_line(found["ceilings"])]
    parts += [f"**{name} failed**: {error}" for name, error in found["errors"].items()]
    if found["mining"]:
        parts += ["### Pair mining", f"![Mining over the size of the batch]({picture(kind)})"]
        parts.append(mining_tables(found["mining"], found["ceilings"]))
    if found["head"]:
        parts += ["### Head and loss", head_table(found["head"])]
    if found["train_step"]:
        parts += ["### Training step", step_table(found["train_step"])]
    return "\n\n".join(parts)


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The document with its marked blocks written anew.

    Raises:
        ValueError: it has no such markers.
    """
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- benchmarks: {name} -->\n).*?(<!-- end of {name} -->)", flags=re.DOTALL)
        text, count = marked.subn(lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(
                f"expected markers <!-- benchmarks: {name} --> and <!-- end of {name} --> once, got {count}"
            )
    return text


def report(root: Path, results: Mapping[str, Found | None]) -> None:
    """Write documents and pictures below `root`."""
    for kind, found in results.items():
        if found is not None and found["mining"]:
            draw_mining(found["mining"], found["origin"]["device"], root / "benchmarks" / picture(kind))
    for document, contents in blocks(results).items():
        file = root / document
        file.write_text(fill(file.read_text(), contents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="of a checkout (default: this one)")
    parser.add_argument("--quick", action="store_true", help="take what run.py --quick wrote")
    options = parser.parse_args()
    report(options.root, newest(options.root / "benchmarks" / "results", options.quick))


if __name__ == "__main__":
    main()
