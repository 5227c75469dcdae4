"""What a request may be: its size, its content type, and how long its body may take to arrive.

It reads the body whole and hands it on in one message, so routes never see a body that is too long, late or cut off.
Headers that never end are the business of `mili.server.connection`, a full queue is the engine's. Invariant: at most
`max_body_bytes` of a body are kept, and the rest of a request that is refused is discarded within bounds, so that the
client is there to read the answer.
"""

import asyncio
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mili.server.errors import ApiError
from mili.server.middleware import send_error

_DISCARD_BYTES = 16 << 20  # of a refused body; a client that goes on sending finds the connection closed
_DISCARD_SECONDS = 5.0


class _BodyTooLong(Exception):
    def __init__(self, complete: bool) -> None:
        super().__init__()
        self.complete = complete  # all of it has been read


class RequestLimits:
    """Answers 408, 413, 415 and 431 to what breaks a limit; everything else gets its body in one piece."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_header_bytes: int, read_timeout: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_header_bytes = max_header_bytes
        self._read_timeout = read_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = {}
        num_bytes = len(scope["path"]) + len(scope["query_string"])
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
            num_bytes += len(name) + len(value) + 4
        announced = _announces_body(headers)
        if (error := self._problem(scope["method"], headers, num_bytes, announced)) is not None:
            await refuse(scope, receive, send, error)
        elif announced:
            await self._with_body(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, method: str, headers: Mapping[bytes, bytes], num_bytes: int, announced: bool) -> ApiError | None:
        """What is wrong with the request as far as its headers tell, which have `num_bytes` with the path."""
        if num_bytes > self._max_header_bytes:
            message = f"the headers have {num_bytes} bytes, the limit is {self._max_header_bytes}"
            return ApiError(431, message, code="headers_too_large")
        if not announced:
            return None
        encoding = headers.get(b"content-encoding", b"").decode("latin-1") or "identity"
        if encoding.lower() != "identity":
            return _unsupported(f"a body in Content-Encoding {encoding[:32]} is not read: send it as it is")
        content_type = headers.get(b"content-type", b"").partition(b";")[0].strip()
        if method == "POST" and content_type.lower() != b"application/json":
            return _unsupported("the body must be JSON and say so: send the header Content-Type: application/json")
        if int(headers.get(b"content-length") or 0) > self._max_body_bytes:
            return self._too_long()
        return None

    def _too_long(self) -> ApiError:
        message = f"the body has more than {self._max_body_bytes} bytes: send less, or raise --max-body-bytes"
        return ApiError(413, message, code="body_too_large")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._read_timeout):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body was not complete after {self._read_timeout:g} s"
            await send_error(send, ApiError(408, message, code="request_timeout", headers={"Connection": "close"}))
            return
        except _BodyTooLong as error:
            if error.complete:
                await send_error(send, self._too_long())
            else:
                await refuse(scope, receive, send, self._too_long())
            return
        if body is None:
            return
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()  # the disconnect, some day
            message, whole = whole, None
            return message

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client left before it was sent."""
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._max_body_bytes:
                raise _BodyTooLong(complete=not more)
        return bytes(body)


async def refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Answer with an error before the body was read.

    Closing a connection that has unread data resets it, and many clients then report the reset instead of the answer.
    So the answer goes out first, the body is discarded within bounds, and only then the connection is closed.
    """
    if not _announces_body(dict(scope["headers"])):
        await send_error(send, error)
        return
    error.headers["Connection"] = "close"
    await send_error(send, error, more_body=True)
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            num_discarded, more = 0, True
            while more and num_discarded < _DISCARD_BYTES:
                part = await receive()
                num_discarded += len(part.get("body", b""))
                more = part["type"] == "http.request" and part.get("more_body", False)
    except TimeoutError:
        pass  # it had its time
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _announces_body(headers: Mapping[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or int(headers.get(b"content-length") or 0) > 0


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")
