"""The life of a server process: bind, load, serve, drain, exit.

    start ──SIGTERM, SIGINT──> drain ──all answered, or timeout──> exit 0
       └──the engine dies────> answer what is left with 503 ─────> exit 1

uvicorn keeps the connections; what it does on signals and its ten wake-ups a second are replaced. Knows no routes.
Invariants: a request that was accepted before the drain is answered unless the drain's time runs out, and while the
drain lasts /ready says so; nothing wakes the process while nobody asks for anything.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
_LAST_WORDS = 2.0  # seconds that /health goes on saying that the engine is dead


def serve(config: ServerConfig, model: str | Path | None, options: Mapping[str, Any]) -> int:
    """Load `model` with the `options` of `LLM`, serve it until a signal or the engine's death; returns the exit code.

    Raises ConfigError and WeightError as `LLM` does, and ConfigError if the address is in use.
    """
    configure_logging(config.log_format)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind(config))
        provider = make_provider(config)
        if provider is not None:
            stack.callback(provider.shutdown)
        steps = StepTotals()
        llm = AsyncLLM(model, max_queue=config.max_queue, on_step=steps.add, **options)
        stack.callback(llm.close)
        app = create_app(llm, config, steps, provider)
        return uvloop.run(_Process(app, config, listener).run())


class _Process:
    """One server, from its first connection to its last."""

    def __init__(self, app: FastAPI, config: ServerConfig, listener: socket.socket) -> None:
        self._operation: Operation = app.state.operation
        self._config = config
        self._listener = listener
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
            timeout_graceful_shutdown=1,  # for bytes on their way: requests were waited for before
        )
        self._server = _Server(settings, self._serve)
        self._exit_code = 0

    async def run(self) -> int:
        """Serve until the end; returns the exit code."""
        await self._server.serve(sockets=[self._listener])
        return self._exit_code

    async def _serve(self) -> None:
        host, port = self._listener.getsockname()[:2]
        _LOG.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        signals: asyncio.Queue[int] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, signals.put_nowait, number)
        async with _tasks(signals.get(), self._operation.llm.wait_dead()) as (asked, died):
            await asyncio.wait((asked, died), return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                await self._after_death(died.result())
                return
            _LOG.info("draining: %d requests are in flight", self._operation.drain.num_in_flight)
            await self._drain(signals, died)

    async def _drain(self, signals: "asyncio.Queue[int]", died: "asyncio.Task[Any]") -> None:
        drain = self._operation.drain
        drain.start()
        async with _tasks(drain.wait_idle(), signals.get()) as (idle, asked_again):
            waiting = (idle, asked_again, died)
            await asyncio.wait(waiting, timeout=self._config.drain_timeout, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                await self._after_death(died.result())
            elif not idle.done():
                _LOG.warning("aborting %d requests that were still in flight", drain.num_in_flight)
                drain.expired = self._operation.metrics.shutting_down = True
                await asyncio.to_thread(self._operation.llm.close)
                await asyncio.wait((idle,), timeout=_LAST_WORDS)

    async def _after_death(self, reason: BaseException) -> None:
        _LOG.critical("%s", reason)
        self._exit_code = 1
        await asyncio.sleep(_LAST_WORDS)


class _Server(uvicorn.Server):
    """uvicorn, with another reason to stop than its own."""

    def __init__(self, settings: uvicorn.Config, until: Any) -> None:
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
async def _tasks(*works: Any) -> Any:
    """`works` as tasks, which end with the block."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
