"""The machine that is measured: what it is called, what it can do at best, and what memory is free."""

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "triton", "timm", "numpy", "pytorch-metric-learning", "apinet-head")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> int:
    """Bytes that the host can give without danger: where nothing is left, the system ends processes."""
    return int(0.8 * psutil.virtual_memory().available)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else None
    return f"{found[1].strip() if found else platform.machine()} CPU"


def origin(device: torch.device) -> dict[str, Any]:
    """Where figures come from: device, date, versions."""
    found: dict[str, Any] = {
        "device": device_name(device), "type": device.type, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "memory": psutil.virtual_memory().total, "date": str(date.today()),
        "python": platform.python_version(), "versions": {name: _version(name) for name in PACKAGES},
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "driver": _driver(), "cuda": torch.version.cuda, "device memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    return found


def write_json(folder: Path, found: Mapping[str, Any], ending: str) -> Path:
    """Write what was found, with its `origin`, to a file named by device and date."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", found["origin"]["device"].lower()).strip("-")
    file = folder / f"{device}-{found['origin']['date']}{ending}.json"
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return file


def ceilings(device: torch.device, dtypes: list[str], quick: bool = False) -> dict[str, Any]:
    """What the device reaches at best: FLOP/s of a large product for each dtype, bytes/s of a large copy.

    The matrices are square, of float32 without TF32 as PyTorch has it; a copy counts what it reads and what it writes.
    """
    side, length = (16384, 2**30) if device.type == "cuda" else (4096, 2**29)
    if quick:
        side, length = side // 4, length // 8
    flops = {}
    for dtype in dtypes:
        x = torch.randn(side, side, device=device).to(getattr(torch, dtype))
        out = torch.empty_like(x)
        flops[dtype] = 2 * side**3 / _quickest(lambda x=x, out=out: torch.mm(x, x, out=out), device)  # type: ignore[misc]
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return {"flops": flops, "bytes": 2 * length / _quickest(lambda: target.copy_(source), device)}


def higher(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of the ceilings the larger figures: what else runs on the machine only lowers them."""
    flops = {dtype: max(value, second["flops"][dtype]) for dtype, value in first["flops"].items()}
    return {"flops": flops, "bytes": max(first["bytes"], second["bytes"])}


def _quickest(call: Any, device: torch.device, times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # it names the build too
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
