"""A server with OpenAI's streams whose times and faults are known beforehand."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeOpenAI:
    """Says `first_delay` seconds nothing, then a chunk every `delay`; `faults` maps a request's number to what fails.

    A fault is a status code, "cut" (no end), "drop" (connection lost), "error" (in it), "garbage" or "no usage".
    """

    first_delay: float = 0.0
    delay: float = 0.0
    tokens_per_chunk: int = 1
    at_once: int = 10_000  # requests served side by side; the others wait
    faults: dict[int, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    url: str = ""
    in_flight: int = 0
    most_in_flight: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            async with self._slots:
                return await self._stream(request, body, fault)
        finally:
            self.in_flight -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], fault: Any) -> web.StreamResponse:
        if isinstance(fault, int):
            error = {"error": {"message": "as\nasked", "type": "x", "param": None, "code": None}}
            return web.json_response(error, status=fault)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        is_chat, num_tokens = "messages" in body, body["max_tokens"]

        async def send(data: str) -> None:
            await response.write(f"data: {data}\r\n\r\n".encode())

        def chunk(text: str, finish_reason: str | None = None) -> str:
            output = {"delta": {"content": text}} if is_chat else {"text": text}
            return json.dumps({"choices": [{"index": 0, **output, "finish_reason": finish_reason}], "usage": None})

        if is_chat:
            await send(chunk(""))  # as OpenAI's first chunk, which has the role only
        for index in range(0, num_tokens, self.tokens_per_chunk):
            await asyncio.sleep(self.delay if index else self.first_delay)
            await send(chunk("é" * min(self.tokens_per_chunk, num_tokens - index)))
        await response.write(b": a comment\n\n")
        if fault == "drop":
            request.transport.abort()
            return response
        if fault == "error":
            await send('{"error": {"message": "the engine failed"}}')
            return response
        if fault == "garbage":
            await send("{not json")
        await send(chunk("", "length"))
        if fault != "no usage":
            usage = {"prompt_tokens": len(str(body.get("prompt") or body["messages"])), "completion_tokens": num_tokens}
            await send(json.dumps({"choices": [], "usage": usage}))
        if fault != "cut":
            await send("[DONE]")
        return response

    @contextmanager
    def serve(self) -> Iterator["FakeOpenAI"]:
        """Run it on a thread, on a port that the system chooses."""
        started, loop, ending = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

        async def run() -> None:
            self._slots = asyncio.Semaphore(self.at_once)
            app = web.Application()
            app.router.add_get("/v1/models", self.models)
            for path in ("/v1/completions", "/v1/chat/completions"):
                app.router.add_post(path, self.complete)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = site.name
            started.set()
            await ending.wait()
            await runner.cleanup()

        thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(ending.set)
            thread.join(10)
            loop.close()
