"""The whole application in process over a fake device, and any application on a socket with mili's connections."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from mili.async_llm import AsyncLLM
from mili.server.app import Operation, create_app
from mili.server.config import ServerConfig
from mili.server.connection import bind, protocol_class
from mili.server.metrics import StepTotals
from support import fake_llm

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "def f(x):", "max_tokens": 5, "ignore_eos": True}


class Application:
    """`create_app` with a client that calls it from synchronous tests."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig, **more: Any) -> None:
        self.llm = llm
        self.app = create_app(llm, config, **more)
        self.operation: Operation = self.app.state.operation
        self.loop = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def start(self) -> None:
        """What a server does before the first request."""
        self.loop.run(self._stack.enter_async_context(self.app.router.lifespan_context(self.app)))

    def close(self) -> None:
        self.loop.run(self._stack.aclose())
        self.loop.run(self.client.aclose())
        self.loop.close()
        self.llm.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.loop.run(self.client.request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def complete(self, status: int = 200, **fields: Any) -> httpx.Response:
        answer = self.request("POST", COMPLETIONS, json={**BODY, **fields})
        assert answer.status_code == status, answer.text
        return answer

    def metric(self, name: str, **labels: str) -> float | None:
        """The value of a series; None if there is none."""
        registry = self.operation.metrics.registry
        name = self.operation.metrics.prefix + name
        return registry.get_sample_value(name, {"model_name": "tiny-qwen3-code", **labels})


class Gate:
    """A `FakeRunner.next_token` that makes the steps wait while it is closed."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self, token_ids: list[int]) -> int:
        assert self.opened.wait(30)
        return 300


@contextmanager
def application(
    monkeypatch: pytest.MonkeyPatch,
    *,
    llm: dict[str, Any] | None = None,
    runner: dict[str, Any] | None = None,
    tracing: Any = None,
    **config: Any,
) -> Iterator[Application]:
    """An application with these options of `AsyncLLM`, `FakeRunner` and `ServerConfig`."""
    fake_llm.install(monkeypatch, **(runner or {}))
    steps = StepTotals()
    settings = ServerConfig(**config)
    made = AsyncLLM(max_queue=settings.max_queue, on_step=steps.add, **(llm or {}))
    served = Application(made, settings, steps=steps, tracing=tracing)
    try:
        served.start()
        yield served
    finally:
        served.close()


@contextmanager
def listening(app: Callable[..., Any], config: ServerConfig) -> Iterator[tuple[str, int]]:
    """`app` on a port of this machine, behind mili's connections."""
    settings = uvicorn.Config(
        app, http=protocol_class(config), ws="none", lifespan="off", log_config=None, timeout_keep_alive=1
    )
    server = uvicorn.Server(settings)
    with bind(config) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
            yield bound.getsockname()[:2]
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)
            assert not thread.is_alive()


def exchange(address: tuple[str, int], *parts: bytes, pause: float = 0.0) -> bytes:
    """Send `parts`, with a pause after each, and read until the other side closes."""
    with socket.create_connection(address, timeout=20) as sock:
        for part in parts:
            sock.sendall(part)
            time.sleep(pause)
        received = b""
        while data := sock.recv(65536):
            received += data
        return received
