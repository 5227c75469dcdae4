"""Who may touch the engine now: one thread at a time, and nobody in the middle of a step.

A stream that nobody reads any more ends its request, and when that happens is Python's choice: garbage is collected in
any thread at any line, also inside a step. So a farewell waits until the turn that is being taken has a pause.

Knows threads and signals; knows no engine. Invariant: a task of `later` runs exactly once, while nobody is in a step.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mili.interrupts import HeldInterrupts


class Turns:
    """Turns at one engine. Ctrl-C waits for a turn's next pause, or its end."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a handler of the caller's may close the engine in the middle of a turn
        self._depth = 0  # of turns inside one another
        self._tasks: deque[Callable[[], object]] = deque()

    @contextmanager
    def take(self) -> Iterator[Callable[[], None]]:
        """Wait for a turn; gives a function to call wherever nothing is half done: a pause."""
        with self._lock, HeldInterrupts() as interrupts:

            def pause() -> None:
                if self._depth == 1:
                    self._catch_up()
                interrupts.check()

            self._depth += 1
            try:
                yield pause
            finally:
                if self._depth == 1:
                    self._catch_up()
                self._depth -= 1

    def later(self, task: Callable[[], object]) -> None:
        """Run `task` now, or at the next pause of the turn that is being taken, here or in another thread."""
        self._tasks.append(task)
        if self._lock.acquire(blocking=False):
            try:
                if self._depth == 0:
                    with self.take():
                        pass
            finally:
                self._lock.release()

    def _catch_up(self) -> None:
        while self._tasks:
            self._tasks.popleft()()
