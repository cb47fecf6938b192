"""Measures mining, head and training step in less than ten minutes, and writes one file, which report.py draws."""

from pathlib import Path

import head
import mining
import train_step
from harness import main

PARTS = {"mining": mining.PART, "head": head.PART, "train_step": train_step.PART}

if __name__ == "__main__":
    main(__doc__, PARTS, Path(__file__).parent / "results")
