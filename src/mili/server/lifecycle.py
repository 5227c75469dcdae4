"""The life of a server process: bind, load, serve, drain, exit.

    start ──SIGTERM, SIGINT──> drain ──all answered, or timeout──> exit 0
       └──the engine dies────> answer what is left with 503 ─────> exit 1

A second signal ends the drain as its timeout does, a third one the process. uvicorn keeps the connections; what it does
on signals and its ten wake-ups a second are replaced. Knows no routes. Invariants: a request that was accepted before
the drain is answered unless the drain's time runs out, and while the drain lasts /ready says so; nothing wakes the
process while nobody asks for anything; no signal waits for an engine that is stuck.
"""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import prometheus_client
import uvicorn
import uvloop
from fastapi import FastAPI

from mili.async_llm import AsyncLLM
from mili.server.access_log import configure_logging
from mili.server.app import Operation, create_app
from mili.server.config import ServerConfig
from mili.server.connection import bind, protocol_class
from mili.server.metrics import StepTotals
from mili.server.tracing import make_provider

_LOG = logging.getLogger("mili.server")
_LAST_WORDS = 2.0  # seconds for the answers to requests that were aborted, and for /health to say that the engine died
_CLOSE_TIMEOUT = 5.0  # seconds for the engine to finish its step, and for the last spans to be exported
_MAX_OPEN_FILES = 65536  # one for each connection; the usual soft limit of 1024 would be the server's


def serve(config: ServerConfig, model: str | Path | None, options: Mapping[str, Any]) -> int:
    """Load `model` with the `options` of `LLM`, serve it until a signal or the engine's death; returns the exit code.

    Raises ConfigError and WeightError as `LLM` does, and ConfigError if the address is in use.
    """
    configure_logging(config.log_format)
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter, which nobody reads
    _raise_file_limit()
    with bind(config) as listener:
        signal.signal(signal.SIGTERM, _stop_loading)
        provider = make_provider(config)
        steps = StepTotals()
        llm = AsyncLLM(
            model, max_queue=config.max_queue, max_event_rate=config.max_event_rate, on_step=steps.add, **options
        )
        try:
            exit_code = uvloop.run(_Process(create_app(llm, config, steps, provider), listener).run())
        finally:
            if provider is not None:
                _within(_CLOSE_TIMEOUT, provider.shutdown)  # a collector that does not answer keeps nobody here
            closed = _within(_CLOSE_TIMEOUT, llm.close)
    if not closed:
        _LOG.critical("the engine does not end its step: leaving without it")
        sys.stderr.flush()
        os._exit(exit_code)  # the interpreter's own end would wait for the device
    return exit_code


class _Process:
    """One server, from its first connection to its last."""

    def __init__(self, app: FastAPI, listener: socket.socket) -> None:
        self._operation: Operation = app.state.operation
        self._config = config = self._operation.config
        self._listener = listener
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._leaving = False  # the drain is over, one way or the other
        settings = uvicorn.Config(
            app,
            http=protocol_class(config),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,  # uvicorn's is kept by a timer; RequestContext writes it
            timeout_keep_alive=round(config.keep_alive),
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(settings, self._serve)
        self._exit_code = 0

    async def run(self) -> int:
        """Serve until the end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        await self._server.serve(sockets=[self._listener])
        return self._exit_code

    def _on_signal(self, number: int) -> None:
        if self._leaving:
            os._exit(128 + number)
        self._signals.put_nowait(number)

    async def _serve(self) -> None:
        host, port = self._listener.getsockname()[:2]
        _LOG.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        if not self._config.api_keys and host not in ("127.0.0.1", "::1"):
            _LOG.warning("no API key is asked for: whoever reaches %s:%d can use the server", host, port)
        async with _tasks(self._signals.get(), self._operation.llm.wait_dead()) as (asked, died):
            await asyncio.wait((asked, died), return_when=asyncio.FIRST_COMPLETED)
            if not died.done():
                await self._drain(died)
            self._leaving = True
            if died.done():
                _LOG.critical("%s", died.result())
                self._exit_code = 1
                await asyncio.sleep(_LAST_WORDS)
                return
        if self._operation.drain.num_in_flight:
            await self._abort()

    async def _drain(self, died: "asyncio.Future[Any]") -> None:
        """Wait until everything is answered, a second signal comes, the engine dies or the time is up."""
        drain, loop = self._operation.drain, asyncio.get_running_loop()
        deadline = loop.time() + self._config.drain_timeout
        drain.start()
        _LOG.info("draining: %d requests are in flight", drain.num_in_flight)
        async with _tasks(drain.wait_idle(), self._signals.get()) as (idle, asked_again):
            waiting = (idle, asked_again, died)
            await asyncio.wait(waiting, timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
            if idle.done():  # what is left of the time is for slow readers to take the last bytes
                self._server.config.timeout_graceful_shutdown = max(1, round(deadline - loop.time()))

    async def _abort(self) -> None:
        """End what is still in flight; its clients read an error."""
        drain = self._operation.drain
        _LOG.warning("aborting %d requests that were still in flight", drain.num_in_flight)
        self._operation.metrics.shutting_down = True
        await asyncio.to_thread(_within, _LAST_WORDS, self._operation.llm.close)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(drain.wait_idle(), _LAST_WORDS)


class _Server(uvicorn.Server):
    """uvicorn, with another reason to stop than its own."""

    def __init__(self, settings: uvicorn.Config, until: Callable[[], Awaitable[None]]) -> None:
        super().__init__(settings)
        self._until = until

    async def main_loop(self) -> None:
        """Serve until `until` returns."""
        await self._until()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


@contextlib.asynccontextmanager
async def _tasks(*works: Awaitable[Any]) -> AsyncIterator[Sequence["asyncio.Future[Any]"]]:
    """`works` as tasks, which end with the block."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _within(seconds: float, function: Callable[[], None]) -> bool:
    """Call `function`, and go on without it if it takes longer; whether it returned."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _stop_loading(number: int, frame: object) -> None:
    """Nothing has been accepted yet. Without a handler the first process of a container would not hear SIGTERM."""
    sys.exit(0)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
