"""What the commands in examples/ share.

Mistakes of the user end a command with a SystemExit, whose text says what is wrong and what to do; once this is
imported, Ctrl-C ends it with a line as well. torch is not imported here, so that commands which do without it start
quickly.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any

DEVICE: dict[str, Any] = {"default": "auto", "help": "auto, cpu, cuda or mps"}


class Command(argparse.ArgumentParser):
    """The parser of a command, whose help is the docstring as it stands, and each flag with its default."""

    def __init__(self, about: str | None, **more: Any) -> None:
        super().__init__(description=about, formatter_class=_Help, **more)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        unsaid = isinstance(action.default, bool | None) or action.default in ("", [], argparse.SUPPRESS)
        told = unsaid or "default" in (action.help or "")
        return (action.help or "") + ("" if told else " (default: %(default)s)")


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


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Wraps the writing of results: turns an error of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise SystemExit(f"{flag} {shown(str(path))} cannot be written: {error.strerror}".lstrip()) from None


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(text: str) -> str:
    """A text with file names, escaped so that every terminal can print it."""
    return text.encode("utf-8", "backslashreplace").decode()


def counted(number: int, what: str) -> str:
    """ "1 image", "2 images", "3 classes"."""
    ending = "es" if what.endswith(("s", "ch")) else "s"
    return f"{number} {what}{'' if number == 1 else ending}"


def listed(names: Sequence[str], shown: int = 5) -> str:
    """The first few in words: "a, b, c, d, e and 2 more"."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def _end_at_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # as shells do; without waiting for threads of half-imported libraries
    sys.__excepthook__(kind, error, trace)


sys.excepthook = _end_at_interrupt
