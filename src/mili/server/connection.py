"""The listening socket and the HTTP connection: the limits that must hold before there is a request to speak of.

uvicorn waits for ever for headers, without a bound on their size, and keeps a connection whose client has gone without
a word. Here a timer closes the first and the kernel the second; nothing runs while a connection is quiet. Knows bytes
and times; a request's body is `mili.server.limits`' business. Invariant: a connection that is neither being answered
nor sending a body ends within `read_timeout` or `keep_alive`.
"""

import asyncio
import socket
from http import HTTPStatus
from typing import cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mili.errors import ConfigError
from mili.server.config import ServerConfig
from mili.server.errors import ApiError
from mili.server.gathered_writes import GatheredWrites

_WIRE_FACTOR = 16  # bytes on the wire for a byte of body: chunks of one byte take six
_WIRE_BYTES = 32 << 20  # on top of that: bodies that are refused and discarded


def bind(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address, not yet listening; ConfigError if the address is not to be had.

    Bound before the model is loaded, so that a port in use is found out at once. Accepted connections inherit its
    options.
    """
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = sorted(found, key=lambda info: info[0] != socket.AF_INET)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            seconds = max(1, round(config.write_timeout))
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 4))
            # Ends connections whose client takes nothing, and those that do not answer the probes.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(config.write_timeout * 1000))
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    return bound


def protocol_class(config: ServerConfig) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with the limits of `config`; uvicorn makes the instances, so they cannot be given it."""

    class Protocol(_Connection):
        limits = config

    return Protocol


class _Connection(HttpToolsProtocol):
    """A connection that must send its headers within `read_timeout` and `max_header_bytes`."""

    limits: ServerConfig
    _timer: asyncio.TimerHandle | None = None
    _in_headers = False
    _in_message = False
    _header_bytes = 0  # that came after the read which began the message
    _message_bytes = 0  # likewise, and of the body as well

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, GatheredWrites(transport, self.loop)))
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data) if self._in_headers else 0
        self._message_bytes += len(data) if self._in_message else 0
        super().data_received(data)
        if self._in_headers and self._timer is None:
            self._await_headers()
        if self._in_headers and self._header_bytes > self.limits.max_header_bytes:
            self._end(431, f"the headers have more than {self.limits.max_header_bytes} bytes", "headers_too_large")
        elif self._in_message and self._message_bytes > _WIRE_BYTES + _WIRE_FACTOR * self.limits.max_body_bytes:
            self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers = self._in_message = True
        self._header_bytes = self._message_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # and not in the trailers, which nobody asked for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_message = False
        super().on_message_complete()

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.limits.read_timeout, self._headers_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_headers()  # the previous request of this connection is still being answered
        elif self._in_headers:
            self._end(408, f"the headers were not complete after {self.limits.read_timeout:g} s", "request_timeout")
        else:
            self.transport.close()

    def _end(self, status: int, message: str, code: str) -> None:
        """Answer and close, unless an earlier request is still being answered: then close alone."""
        if self.cycle is None or self.cycle.response_complete:
            self._write_error(ApiError(status, message, code=code))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for bytes that are not HTTP; here with the error envelope."""
        self._end(400, "the request is not valid HTTP", "bad_request")

    def _write_error(self, error: ApiError) -> None:
        response = error.response()
        lines = [b"%b: %b" % item for item in response.raw_headers]
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"\r\n".join((status, *lines, b"connection: close", b"", bytes(response.body))))
