"""Where measured figures come from, and the files that they go to."""

import json
import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def origin(device: torch.device) -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": str(date.today()), "device": device_name(device), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": version("timm"),
        "python": platform.python_version(),
    }  # fmt: skip


def write_json(folder: Path, subject: str, result: dict[str, Any]) -> Path:
    """Write a result with its `origin` as DEVICE-DATE-SUBJECT.json; a table or plot goes beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    device, day = (result["origin"][key] for key in ("device", "date"))
    file = folder / f"{device.replace(' ', '-').lower()}-{day}-{subject}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file
