"""Being asked to stop: SIGTERM, as machines that are taken away send it, and SIGINT, from the keyboard."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While entered, notes the signals instead of following them, so that the step can be finished and saved.

    Attributes:
        signal: the number of the last one, 0 if there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells' background jobs want it
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        # Later ones change nothing: torchrun passes on what the terminal has sent to all processes already.
        if not self.signal:
            # Not print(), which fails if the signal came in the midst of another print().
            os.write(
                2, f"\n{signal.Signals(number).name}: finishing the step and saving (SIGKILL ends at once)\n".encode()
            )
        self.signal = number
