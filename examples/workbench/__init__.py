"""What the commands in examples/ share.

Mistakes of the user end a command with a SystemExit, whose text says what is wrong and what to do. torch is not
imported here, so that commands which do without it start quickly.
"""

import argparse
from collections.abc import Callable
from math import inf
from typing import Any


def number(kind: type, least: float, most: float = inf) -> Callable[[str], Any]:
    """For argparse: a finite number from `least` to `most`."""

    def parse_number(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most or value == inf:
            limits = f"at least {least:g}" if most == inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    parse_number.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse_number
