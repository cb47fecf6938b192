"""Ctrl-C ends a command with one line, not a traceback. Import it first: the imports that follow take seconds."""

import os
import sys
from types import TracebackType


def end_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook that prints one line for KeyboardInterrupt."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # as shells do; without waiting for threads of half-imported libraries
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_interrupted
