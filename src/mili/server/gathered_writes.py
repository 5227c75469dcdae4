"""A connection's writes, gathered: what is written in one turn of the event loop leaves in one system call.

uvicorn writes the head of an answer and each part of its body by themselves, and uvloop sends each at once. Such a call
takes as long as making a short event does, and it wakes the client. Knows bytes, not what they say. Invariant: what was
written is sent in its order, by the loop's next turn at the latest and before the connection closes.
"""

import asyncio
from typing import Any

_MOST_BYTES = 1 << 16  # more is sent at once, so that the transport can tell its protocol to pause


class GatheredWrites:
    """Stands for `transport`, and passes on what it does not know."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._num_bytes = 0

    def write(self, data: bytes) -> None:
        """Send `data`, perhaps with what is written next."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._num_bytes += len(data)
        if self._num_bytes > _MOST_BYTES:
            self._flush()

    def close(self) -> None:
        """Close the connection when everything is sent."""
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._parts and not self._transport.is_closing():
            self._transport.write(self._parts[0] if len(self._parts) == 1 else b"".join(self._parts))
        self._parts.clear()
        self._num_bytes = 0
