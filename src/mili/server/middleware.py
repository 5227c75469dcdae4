"""What the server's middlewares share, and the outermost of them: one `Exchange` for every HTTP request.

All are plain ASGI callables: Starlette's BaseHTTPMiddleware hides disconnects from the routes and costs a task for each
request. `RequestContext` gives a request its id and its end: it knows no route and no engine. Invariant: every HTTP
request is reported exactly once, with the status the client got, or 499 if it left before it had all of the answer.
"""

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import formatdate

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mili.server.errors import ApiError, as_api_error

_LOG = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's; in log and metrics only, nobody is there to receive it
PROBE_PATHS = frozenset(("/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready", "/metrics"))
OPEN_PATHS = PROBE_PATHS | {"/"}  # need no key and are answered during a drain; none of them shows what users send
UNMATCHED = "unmatched"  # stands for every path that is no route: labels must stay few
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and how it ended."""

    request_id: str
    client: str  # address, without port
    method: str
    path: str  # as requested, without the query
    template: str  # the route's path, or UNMATCHED
    status: int
    seconds: float

    @property
    def method_label(self) -> str:
        """The method, from a fixed set."""
        return self.method if self.method in _METHODS else "other"

    @property
    def is_probe(self) -> bool:
        """Whether a machine asks this every few seconds."""
        return self.template in PROBE_PATHS


def header(scope: Scope, name: bytes) -> str | None:
    """The first header called `name` (lower case), or None."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def send_error(send: Send, error: ApiError, *, more_body: bool = False) -> None:
    """Answer with `error`; with `more_body` the caller ends the response later."""
    response = error.response()
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": more_body})


class _Date:
    """The value of the header Date, made once a second."""

    def __init__(self) -> None:
        self._second, self._text = 0, b""

    def header(self) -> bytes:
        """Of this second."""
        if (second := int(time.time())) != self._second:
            self._second, self._text = second, formatdate(second, usegmt=True).encode()
        return self._text


class RequestContext:
    """Outermost middleware: request id, Date, the 500 for what nobody caught, and the report of the end."""

    def __init__(self, app: ASGIApp, paths: frozenset[str], sinks: Sequence[Callable[[Exchange], None]]) -> None:
        """`paths` are the routes' paths, for requests that are refused before a route is found."""
        self._app = app
        self._paths = paths
        self._sinks = sinks
        self._date = _Date()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = header(scope, b"x-request-id")
        request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None
        complete = disconnected = False

        async def noting_receive() -> Message:
            nonlocal disconnected
            message = await receive()
            if message["type"] == "http.disconnect":
                disconnected = not complete
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"date", self._date.header()),
                    (b"x-request-id", request_id.encode()),
                ]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self._app(scope, noting_receive, noting_send)
        except Exception as error:
            if status is not None:
                raise  # the server closes the connection: the client must not take half an answer for a whole one
            answer = as_api_error(error)
            if answer.status == 500:
                _LOG.error("request %s failed", request_id, exc_info=error)
            await send_error(noting_send, answer)
        finally:
            if disconnected and not complete:
                status = CLIENT_CLOSED_REQUEST
            exchange = Exchange(
                request_id=request_id,
                client=(scope.get("client") or ("-",))[0],
                method=scope["method"],
                path=scope["path"],
                template=self._template(scope),
                status=500 if status is None else status,
                seconds=time.perf_counter() - started,
            )
            for sink in self._sinks:
                sink(exchange)

    def _template(self, scope: Scope) -> str:
        if (route := scope.get("route")) is not None:
            return str(route.path)
        return scope["path"] if scope["path"] in self._paths else UNMATCHED
