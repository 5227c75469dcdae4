"""Ctrl-C waits until nothing is half done.

Python raises KeyboardInterrupt between any two instructions, and between some of them a request is in no queue or a
page in no list. The device's work cannot be interrupted anyway, so to wait for the end of a step costs nothing.

Knows signals only. Invariant: a signal that came while it was held back is passed on exactly once, to the handler that
was there before.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class HeldInterrupts:
    """A context in which Ctrl-C has no effect before `check`, or the context's end; nothing outside the main thread."""

    def __init__(self) -> None:
        self._previous: Any = None  # the handler that is called later; None if signals are not held back
        self._pending: tuple[int, FrameType | None] | None = None

    def check(self) -> None:
        """Let the previous handler have a signal that came: Python's raises KeyboardInterrupt."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._previous(*pending)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self.check()

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._pending = number, frame
