"""One replica of the Ray Serve application: `mili serve` without its HTTP server.

Requests come as `HttpRequest` from the ingress and are answered by the very application that `mili serve` runs, so that
endpoints, errors and streams are the same. Ray Serve owns the process, its health checks and its shutdown.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from ray import serve

from mili.async_llm import AsyncLLM
from mili.ray.asgi import HttpRequest, Message, respond
from mili.server.app import create_app
from mili.server.config import ServerConfig
from mili.server.metrics import StepTotals
from mili.server.tracing import make_provider


class Replica:
    """A model and its application."""

    async def __init__(self, model: str | None, config: ServerConfig, options: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Load the model; Serve sends requests when this has returned."""
        self._resources = AsyncExitStack()
        steps = StepTotals()
        load = partial(AsyncLLM, model, max_queue=config.max_queue, on_step=steps.add, **options)
        self._llm = await asyncio.to_thread(load)
        self._resources.push_async_callback(asyncio.to_thread, self._llm.close)
        tracing = make_provider(config)
        if tracing is not None:
            self._resources.push_async_callback(asyncio.to_thread, tracing.shutdown)
        self._app = create_app(self._llm, config, steps, tracing)
        await self._resources.enter_async_context(self._app.router.lifespan_context(self._app))

    async def handle_http(self, request: HttpRequest) -> AsyncIterator[list[Message]]:
        """Answer a request with ASGI messages; cancellation is the client's disconnection."""
        async for messages in respond(self._app, request):
            yield messages

    async def handle_whole(self, request: HttpRequest) -> tuple[str, Message, bytes]:
        """The replica's id and its whole answer: the start of the response, and the body."""
        messages = [message async for some in respond(self._app, request) for message in some]
        replica = serve.get_replica_context().replica_id.unique_id
        return replica, messages[0], b"".join(message.get("body", b"") for message in messages[1:])

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine has died."""
        self._llm.check_health()

    async def __del__(self) -> None:
        """Called by Serve when no request is left, or the time for them is over, or the start has failed."""
        await self._resources.aclose()
