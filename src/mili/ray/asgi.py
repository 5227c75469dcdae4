"""One HTTP request to an ASGI application in this process: the request as plain data in, ASGI messages out.

The application sees what it would see behind an HTTP server. Knows nothing of Ray, of routes or of models.
Invariant: when `respond` is left, by its end, `aclose` or cancellation, the application's task is over.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)

# What of a scope can be sent to another process; the rest belongs to the server that received the request.
_SCOPE_KEYS = ("http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client")
_LEAVE_SECONDS = 1.0  # what an application gets to notice that the client has gone before it is cancelled
_READ_AHEAD = 64  # messages an application may be ahead of its reader


@dataclass(frozen=True)
class HttpRequest:
    """A request whose body has been read, and what routing goes by."""

    scope: Mapping[str, Any]
    body: bytes
    prefix_blocks: tuple[bytes, ...] = ()

    @classmethod
    def from_scope(cls, scope: Mapping[str, Any], body: bytes, prefix_blocks: tuple[bytes, ...]) -> "HttpRequest":
        """The request of an ASGI `scope`, without what cannot leave this process."""
        return cls({key: scope[key] for key in _SCOPE_KEYS if key in scope}, body, prefix_blocks)


async def respond(app: Application, request: HttpRequest) -> AsyncIterator[list[Message]]:
    """Run `app` on the request and yield its messages, as many at a time as there are.

    Raises:
        Exception: What `app` raised before its response was complete; after that it is only logged.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue(_READ_AHEAD)
    complete = asyncio.Event()
    left = asyncio.Event()
    unread = [request.body]

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await messages.put(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            complete.set()

    async def run() -> None:
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, **request.scope}
        try:
            await app(scope, receive, send)
        except Exception:
            if not complete.is_set():
                raise
            _log.exception("the application failed after its response to %s", scope["path"])  # Starlette's habit
        finally:
            if not left.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    try:
        ended = False
        while not ended:
            batch = [await messages.get()]
            while not messages.empty():
                batch.append(messages.get_nowait())
            ended = batch[-1] is None
            if some := [message for message in batch if message is not None]:
                yield some
        await task
    finally:
        left.set()
        if not task.done():
            await asyncio.wait([task], timeout=_LEAVE_SECONDS)
            task.cancel()
            await asyncio.wait([task])
