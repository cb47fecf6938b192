"""Ctrl-C ends a command with a line, not a traceback. Imported first: the imports after this one take seconds."""

import os
import sys
from types import TracebackType


def end_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says how an exception that nothing caught ended the command; of Ctrl-C, in a line."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\ninterrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)  # as shells have it; threads of the libraries imported by halves are not waited for


sys.excepthook = end_interrupted
