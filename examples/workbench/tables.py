"""Tables of figures in Markdown, and where the figures come from."""

import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import timm
import torch

from apinet_head import __version__
from workbench import counted


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table whose first columns are `names`, and the others figures."""
    rule = ["---"] * names + ["---:"] * (len(columns) - names)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows))


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """ "mean ± standard deviation", or the one value there is."""
    if digits is None:
        digits = 2 if max(map(abs, values)) < 10 else 1
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def machine(device: str, threads: int = 0) -> str:
    """The device, threads (0: those of this process), versions and date of a measurement."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
        name = f"{found[1].strip() if found else platform.machine()}, {os.cpu_count()} cores"
        name += "" if device == "cpu" else f", {device}"
    used = counted(threads or torch.get_num_threads(), "thread")
    versions = f"torch {torch.__version__}, timm {timm.__version__}, apinet-head {__version__}"
    return f"{name}; {used}, Python {platform.python_version()}, {versions}; {date.today()}"
