"""Lets MAX's polling thread sleep while there is nothing for it to do.

The first execution of a graph starts a thread that wakes every 0.2 ms for as long as the process lives: a tenth of a
core for an idle server, and on a CPU so much less for its kernels. It waits with a timer, and Linux lets a process say
how late a thread's timers may be. Linux only, elsewhere this does nothing.

Invariant: while any runner of the process works on a GPU, every timer is as exact as the system made it.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TASKS = Path("/proc/self/task")
_EXACT_NS = 50_000  # Linux's own default
_LATE_NS = 50_000_000


class RuntimeThreads:
    """The threads that MAX started. MAX has one set of them in a process, so there is one of these: `of_process`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids: list[str] | None = None  # unknown before the first execution
        self._working: set[object] = set()  # the runners that may execute on a GPU at any moment

    @contextlib.contextmanager
    def working(self, runner: object, *, on_cpu: bool) -> Iterator[None]:
        """Around an execution by `runner`; on the CPU it is over when it returns, and nothing needs polling."""
        if not on_cpu and runner not in self._working:
            with self._lock:
                if not self._working:
                    self._set_slack(_EXACT_NS)
                self._working.add(runner)
        if self._ids is not None:
            yield
            return
        before = _threads()
        yield
        with self._lock:
            self._ids = sorted(_threads() - before)
            if not self._working:
                self._set_slack(_LATE_NS)

    def rest(self, runner: object) -> None:
        """`runner` has nothing left to compute for now."""
        if runner in self._working:
            with self._lock:
                self._working.remove(runner)
                if not self._working:
                    self._set_slack(_LATE_NS)

    def _set_slack(self, nanoseconds: int) -> None:
        for thread in self._ids or ():
            with contextlib.suppress(OSError):  # the thread has ended, or this is not Linux
                Path(f"/proc/{thread}/timerslack_ns").write_text(str(nanoseconds))


@cache
def of_process() -> RuntimeThreads:
    """The runtime threads of this process."""
    return RuntimeThreads()


def _threads() -> set[str]:
    return {task.name for task in _TASKS.iterdir()} if _TASKS.is_dir() else set()
