"""The drain: from its start on new requests are refused, those that are in flight are waited for.

It counts HTTP requests from their headers to the last byte of their answer, so a body still being sent and a stream
still being read are in flight as well. Probes are neither counted nor refused. Invariant: a request that was let in is
counted until it ends; after `start` no request is let in.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from mili.server.errors import ApiError
from mili.server.limits import refuse

_RETRY_AFTER = "5"  # seconds in which a load balancer has noticed, or a successor is ready


class Drain:
    """State of one application; used on its event loop only."""

    def __init__(self) -> None:
        self.started = False
        self.num_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Let no further request in."""
        self.started = True

    async def wait_idle(self) -> None:
        """Return when nothing is in flight."""
        await self._idle.wait()

    def enter(self) -> None:
        """A request was let in."""
        self.num_in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """It has ended."""
        self.num_in_flight -= 1
        if self.num_in_flight == 0:
            self._idle.set()


class DrainGate:
    """Answers 503 once the drain has started; open paths go on."""

    def __init__(self, app: ASGIApp, drain: Drain, open_paths: frozenset[str]) -> None:
        self._app = app
        self._drain = drain
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
        elif self._drain.started:
            message = "the server is shutting down: try again later or elsewhere"
            headers = {"Retry-After": _RETRY_AFTER, "Connection": "close"}
            error = ApiError(503, message, type="service_unavailable", code="draining", headers=headers)
            await refuse(scope, receive, send, error)
        else:
            self._drain.enter()
            try:
                await self._app(scope, receive, send)
            finally:
                self._drain.leave()
