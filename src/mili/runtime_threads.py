"""Lets MAX's polling thread sleep while there is nothing for it to do, and its workers give way to other threads.

The first execution of a graph starts a thread that wakes every 0.2 ms for as long as the process lives: a tenth of a
core for an idle server, and on a CPU so much less for its kernels. It waits with a timer, and Linux lets a process say
how late a thread's timers may be.

The workers, one a core, look for work without sleeping. Each step wakes the engine's thread and maybe a server's event
loop, and what they do between two executions is done by nobody else, but to Linux all of them are alike: who wakes
waits until a worker's turn is over. So the workers are nicer than the thread that makes them work.

Linux only, elsewhere this does nothing.

Invariant: while any runner of the process works on a GPU, every timer is as exact as the system made it.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TASKS = Path("/proc/self/task")
_EXACT_NS = 50_000  # Linux's own default
_LATE_NS = 50_000_000
_NICER = 5  # than the caller: a third of its weight. With 10 steps other programs leave too little for the kernels
_WORKER = "Thread"  # in the names of MAX's workers, a flame and a number around it


class RuntimeThreads:
    """The threads that MAX started. MAX has one set of them in a process, so there is one of these: `of_process`."""

    def __init__(self) -> None:
        self.process = os.getpid()  # a fork of it inherits this object but not the threads
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

    def give_way(self) -> None:
        """Let whoever wakes interrupt the workers; for a runner on the CPU, whose device is open."""
        niceness = min(os.getpriority(os.PRIO_PROCESS, 0) + _NICER, 19)
        for thread in _threads():
            with contextlib.suppress(OSError):
                if _WORKER in (_TASKS / thread / "comm").read_text(encoding="utf-8"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), niceness)

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
