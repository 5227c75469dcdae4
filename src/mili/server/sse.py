"""Server-sent events: a response that streams, and ends as OpenAI's clients expect.

Knows bytes, not what they say. Invariant: what goes wrong before the first event has a status code; what goes wrong
later is an event with the error envelope, and then there is no ``[DONE]``.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mili.server.concurrency import until_disconnected
from mili.server.errors import ClientDisconnected, as_api_error
from mili.server.json_text import json_bytes

_log = logging.getLogger(__name__)
_DONE = b"data: [DONE]\n\n"
# A proxy that buffers would hold tokens back; nginx reads the second header.
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends events as they come; each item of `events` is one or several, framed. Closes `events` whatever happens."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, headers=_HEADERS, media_type="text/event-stream")
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnected(receive, self._send(scope, send))
        except ClientDisconnected:
            if not self._started:
                raise

    async def _send(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._events) as events:
            body = await anext(events)
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                try:
                    body = await anext(events)
                except StopAsyncIteration:
                    last = _DONE
                    break
                except Exception as error:
                    told = as_api_error(error)
                    # A traceback only of what nobody foresaw: when the engine ends, so do all of its streams.
                    request_id = scope.get("state", {}).get("request_id")
                    _log.error("request %s failed in its stream: %s", request_id, error, exc_info=told.status == 500)
                    last = b"data: " + json_bytes(told.body) + b"\n\n"
                    break
        await send({"type": "http.response.body", "body": last, "more_body": False})
