"""`mili serve` in a process of its own, as a user starts it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import httpx


@dataclass(frozen=True)
class Live:
    """A server that is ready."""

    url: str
    process: subprocess.Popen
    output: IO[str]  # a file, so that a server nobody listens to never waits

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        """Everything the server has printed so far."""
        self.output.seek(0)
        return self.output.read()


def free_port() -> int:
    """A port of the loopback address that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(*args: str, exit_code: int | None = 0, **environment: str) -> Iterator[Live]:
    """Start `mili serve` with `args`, wait for /ready, and end it with SIGTERM, after which it must exit with 0.

    `exit_code` is what it must have ended with; None if the test ended it and looks for itself.
    """
    port = free_port()
    command = [sys.executable, "-m", "mili", "serve", "--port", str(port), *args]
    variables = {**os.environ, "MODULAR_TELEMETRY_ENABLED": "0", **environment}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            yield from _served(Live(f"http://127.0.0.1:{port}", process, output), exit_code)
        finally:
            process.kill()
            process.wait()


def _served(live: Live, exit_code: int | None) -> Iterator[Live]:
    process = live.process
    wait_ready(live)
    yield live
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait(60)
    if exit_code is not None:
        assert process.returncode == exit_code, live.log()


def wait_ready(live: Live, seconds: float = 180.0) -> None:
    """Wait until the server says that it is ready."""
    deadline = time.monotonic() + seconds  # the first start compiles
    while True:
        assert live.process.poll() is None, live.log()
        try:
            if httpx.get(f"{live.url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the server does not become ready"
        time.sleep(0.1)
