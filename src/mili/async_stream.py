"""How outputs get from the engine's thread to readers on event loops.

`Stream` is one reader's side of a request, `Mailbox` the door of one event loop. Knows no engine and no prompts.
Invariants: a stream's outputs are cumulative, and the deltas of those its reader sees join to the text of the last one
however many were merged on the way; `busy` holds from a delivery until the loop has handed it out.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from mili.outputs import RequestOutput

News: TypeAlias = RequestOutput | BaseException


class Stream:
    """The outputs of one request on their way to its reader, who is alone; used on the mailbox's event loop only."""

    def __init__(self, request_id: str, n: int, mailbox: "Mailbox", final_only: bool) -> None:
        self.request_id = request_id
        self.n = n
        self.mailbox = mailbox
        self.final_only = final_only  # the reader waits for the last output
        self.ended = False  # the reader has seen the last output, or the exception
        self._news: News | None = None
        self._reader: asyncio.Future[None] | None = None

    async def next(self) -> RequestOutput:
        """Wait for the next output, or raise what ended the request."""
        if self._news is None:
            self._reader = self.mailbox.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        news, self._news = self._news, None
        assert news is not None
        if isinstance(news, BaseException):
            self.ended = True
            raise news
        self.ended = news.finished
        return news

    def put(self, news: News) -> None:
        """Take an output or the exception that ended the request; it replaces an unread output and keeps its deltas."""
        unread = self._news
        if isinstance(news, RequestOutput) and isinstance(unread, RequestOutput):
            pairs = zip(unread.outputs, news.outputs, strict=True)
            news = replace(news, outputs=[replace(new, delta=old.delta + new.delta) for old, new in pairs])
        self._news = news
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Mailbox:
    """The door of one event loop, which the engine's thread knocks on."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_free: Callable[[], None]) -> None:
        """`on_free` is called on `loop` when outputs were handed out and there is room for more."""
        self.loop = loop
        self.busy = False  # set by the sender, cleared by the loop
        self._on_free = on_free

    def post(self, batch: Sequence[tuple[Stream, News]]) -> bool:
        """Send `batch` to the loop, from any thread; False if the loop is closed and nobody will read."""
        self.busy = True
        try:
            self.loop.call_soon_threadsafe(self._hand_out, batch)
        except RuntimeError:
            return False
        return True

    @property
    def has_room(self) -> bool:
        """Whether to send more; a closed loop has room, so that sending finds out."""
        return not self.busy or self.loop.is_closed()

    def _hand_out(self, batch: Sequence[tuple[Stream, News]]) -> None:
        for stream, news in batch:
            stream.put(news)
        self.busy = False
        self._on_free()
