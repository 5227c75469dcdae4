"""Whether a grammar can be compiled soon and safely: tried out in another process first.

A hostile schema of a few bytes keeps llguidance busy for minutes, and one of some kilobytes overflows its stack, which
no exception reports; nor can it be interrupted. So it meets an unknown grammar first in a process that can be killed.
Knows processes and time; knows no grammar. Invariant: a grammar that passes compiles here in about the time it took
there, on any thread with a stack of 8 MB.
"""

import json
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mili.errors import MiliError

__all__ = ["GrammarTrial"]

_START_SECONDS = 60.0
_WORKER = Path(__file__).with_name("_grammar_worker.py")


class GrammarTrial:
    """One process, started by the first trial and again after each that ends badly. May be shared by threads."""

    def __init__(self, vocabulary: Callable[[], Mapping[str, Any]], seconds: float) -> None:
        """`vocabulary()` is what the process reads first; a grammar may take `seconds`."""
        self._vocabulary = vocabulary
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None

    def passes(self, grammar: str) -> bool:
        """Whether compiling `grammar` ends within the time; waits for other threads' trials first."""
        with self._lock:
            if self._process is None:
                self._start()
            if self._ask(grammar, self._seconds):
                return True
            self.close()
            return False

    def close(self) -> None:
        """End the process; the next trial starts another."""
        self._stop()
        self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us
        )
        self._stop = weakref.finalize(self, _end, self._process)
        if not self._ask(self._vocabulary(), _START_SECONDS):
            self.close()
            raise MiliError(f"the grammar process did not start within {_START_SECONDS:g} s: run {_WORKER} to see why")

    def _ask(self, value: Any, seconds: float) -> bool:
        """Send a line; whether the answer comes in time."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return bool(ready) and self._process.stdout.read(1) == b"."


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()  # closes the pipes and reaps it
