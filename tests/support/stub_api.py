"""A server with mili's page and API in which a test plays the model, one event at a time."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from mili.server.page import load_page


class Stream:
    """A request that a client has made, and the answer to it as the test gives it."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> None:
        self.path, self.headers, self.body = path, headers, body
        self.closed = threading.Event()  # the answer has ended, or the client is gone
        self._loop = asyncio.get_running_loop()
        self._chunks: asyncio.Queue[bytes | None] = asyncio.Queue()

    def send_bytes(self, chunk: bytes | None) -> None:
        """Send `chunk` as it is; None ends the answer."""
        self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunk)

    def send(self, *events: dict[str, Any]) -> None:
        for event in events:
            self.send_bytes(f"data: {json.dumps(event)}\n\n".encode())

    def text(self, *pieces: str) -> None:
        """Send pieces of text in the way of the endpoint that was asked."""
        chat = self.path.endswith("/chat/completions")
        self.send(*(chunk({"content": piece}) if chat else {"choices": [{"text": piece}]} for piece in pieces))

    def end(self, *, tokens: int = 1, prompt: int = 1, cached: int = 0, reason: str = "stop") -> None:
        """Send the last events of a complete answer."""
        details = {"cached_tokens": cached}
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "prompt_tokens_details": details}
        self.send(chunk({}, finish_reason=reason), {"choices": [], "usage": usage})
        self.send_bytes(b"data: [DONE]\n\n")
        self.send_bytes(None)

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            while (chunk := await self._chunks.get()) is not None:
                yield chunk
        finally:
            self.closed.set()


def chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    """A chat completion chunk."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}


class StubApi:
    """What a test sees of the server. Each POST waits in `streams` to be answered, unless `refusal` answers it."""

    def __init__(self) -> None:
        self.streams: Queue[Stream] = Queue()
        self.models = ["stub"]
        self.api_key = ""
        self.refusal: tuple[int, dict[str, Any] | str] | None = None
        self.url = ""

    def next(self) -> Stream:
        """The oldest request that nobody has looked at yet."""
        return self.streams.get(timeout=10)

    async def page(self, request: Request) -> Response:
        page = load_page()
        return HTMLResponse(page.body, headers=page.headers)

    async def list_models(self, request: Request) -> Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return JSONResponse({"error": {"message": "wrong API key", "type": "authentication_error"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def generate(self, request: Request) -> Response:
        if self.refusal is not None:
            status, answer = self.refusal
            headers = {"X-Request-Id": "r-7"}
            if isinstance(answer, str):
                return HTMLResponse(answer, status, headers)
            return JSONResponse({"error": answer}, status, headers)
        stream = Stream(request.url.path, dict(request.headers), await request.json())
        self.streams.put(stream)
        return StreamingResponse(stream.chunks(), media_type="text/event-stream")


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Serve `app` on a free port of 127.0.0.1, from a thread; yields its URL."""
    config = uvicorn.Config(app, port=0, ws="none", log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server did not start"
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def running_stub() -> Iterator[StubApi]:
    """A stub that is being served."""
    stub = StubApi()
    routes = [
        Route("/", stub.page),
        Route("/v1/models", stub.list_models),
        Route("/v1/chat/completions", stub.generate, methods=["POST"]),
        Route("/v1/completions", stub.generate, methods=["POST"]),
    ]
    with serving(Starlette(routes=routes)) as stub.url:
        yield stub
