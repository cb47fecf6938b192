"""Ctrl-C ends a command with a line, not a traceback. Imported first: the imports after this one take seconds."""

import os
import sys
from types import TracebackType


def end_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says how an exception that nothing caught ended the command; of Ctrl-C, in a line."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # as shells have it; threads of the libraries imported by halves are not waited for
    sys.__excepthook__(kind, error, trace)


sys.excepthook = end_interrupted
