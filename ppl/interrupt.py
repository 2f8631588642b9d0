"""Ctrl-C while a run is open: SIGINT goes to a handler of ours, and back to whom it belonged."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["SignalHandler"]

Handler = Callable[[int, FrameType | None], None]


class SignalHandler:
    """Holds SIGINT between `install` and `restore`."""

    def __init__(self) -> None:
        self._handler: Handler | None = None
        self._previous: Any = None

    def install(self, handler: Handler) -> None:
        """Take over SIGINT, in the main thread only, and not where the process was told to ignore it.

        Args:
            handler: called with the number of the signal and the frame.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGINT)
        if previous is None or previous == signal.SIG_IGN:
            return
        self._handler, self._previous = handler, previous
        signal.signal(signal.SIGINT, handler)

    def restore(self) -> None:
        """Give SIGINT back."""
        # == and not `is`: a bound method is a new object at each access. A handler set by someone else meanwhile stays.
        if self._handler is not None and signal.getsignal(signal.SIGINT) == self._handler:
            signal.signal(signal.SIGINT, self._previous)
        self._handler = self._previous = None
