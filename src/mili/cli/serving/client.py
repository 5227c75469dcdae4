"""Sends requests and keeps the time: when each was due, when its tokens came, how it ended.

Knows HTTP and the API's streams; adds nothing up. Invariant: every request sent has exactly one `Record`.
aiohttp, because a chunk costs it less than half of httpx2's CPU time, and client and server may share their cores.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_PARTS = ("content", "reasoning", "reasoning_content", "tool_calls")  # of a chat delta, any of which is output


@dataclass(slots=True)
class Record:
    """One request; times in seconds by `time.perf_counter`."""

    due: float  # when it was to be sent; all latencies count from here
    sent: float
    token_times: list[float] = field(default_factory=list)  # of the chunks with output, one or more tokens each
    ended: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None  # its kind
    detail: str = ""

    def fail(self, kind: str, detail: str = "") -> None:
        """Note how it failed; the first cause counts."""
        if self.error is None:
            self.error, self.detail = kind, " ".join(detail.split())[:200]


class EventParser:
    """The `data` of server-sent events, from bytes cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """The events that `received` completes."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
        return events


class Client:
    """A connection pool to one server; an async context manager."""

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout: float) -> None:
        self._base_url = base_url
        self._headers = {"content-type": "application/json", **headers}
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(limit=0)  # the load decides how many are open
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def get(self, path: str) -> Any:
        """The JSON at a path; OSError or ValueError if there is none."""
        try:
            async with self._session.get(self._base_url + path) as response:
                response.raise_for_status()
                return await response.json(content_type=None)
        except aiohttp.ClientError as error:
            raise OSError(str(error)) from error

    async def send(self, path: str, body: bytes, due: float | None = None) -> Record:
        """Send one request and read its stream to the end; a failure is in the record."""
        sent = time.perf_counter()
        record = Record(sent if due is None else due, sent)
        try:
            async with self._session.post(self._base_url + path, data=body) as response:
                if response.status == 200:
                    await _read(response, record)
                else:
                    record.fail(f"HTTP {response.status}", _message(await response.text()))
        except TimeoutError:
            record.fail("timeout")
        except aiohttp.ClientConnectorError as error:
            record.fail("no connection", str(error))
        except (aiohttp.ClientError, ConnectionError) as error:
            record.fail("connection lost", str(error))
        record.ended = time.perf_counter()
        return record


async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
    parser, done = EventParser(), False
    async for received in response.content.iter_any():
        now = time.perf_counter()
        for event in parser.feed(received):
            if event == b"[DONE]":
                done = True
            else:
                _take(event, now, record)
    if not done:
        record.fail("stream cut short")
    if not record.completion_tokens:
        record.fail("no usage", "the stream did not say how many tokens it had")
    if not record.token_times:
        record.fail("no output")


def _take(event: bytes, now: float, record: Record) -> None:
    """Note what one event of a stream says."""
    try:
        chunk = json.loads(event)
        if "error" in chunk:
            record.fail("error in stream", str(chunk["error"]))
            return
        if usage := chunk.get("usage"):
            record.prompt_tokens, record.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            has_output = choice.get("text") or any(delta.get(part) for part in _PARTS)
            # Output that has no text at all, such as half a character, shows only in the last chunk.
            if has_output or (choice.get("finish_reason") and not record.token_times):
                record.token_times.append(now)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        record.fail("bad stream", f"{type(error).__name__}: {error}")


def _message(text: str) -> str:
    """What the body of an error says, in the API's envelope or not."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text


async def closed_loop(
    client: Client, path: str, bodies: Sequence[bytes], num: int, on_done: Callable[[], Any]
) -> list[Record]:
    """Keep `num` requests in flight: each is sent when one before it has ended."""
    remaining, records = iter(bodies), []

    async def one_after_another() -> None:
        for body in remaining:
            records.append(await client.send(path, body))
            on_done()

    await asyncio.gather(*(one_after_another() for _ in range(num)))
    return records


async def open_loop(
    client: Client, path: str, bodies: Sequence[bytes], times: Sequence[float], on_done: Callable[[], Any]
) -> list[Record]:
    """Send each at its time after the start, however many are in flight, and count its latency from then.

    A server that falls behind thus cannot delay the requests that would have shown it ("coordinated omission").
    """

    async def send(body: bytes, due: float) -> Record:
        record = await client.send(path, body, due)
        on_done()
        return record

    start, tasks = time.perf_counter(), []
    for body, after in zip(bodies, times, strict=True):
        await asyncio.sleep(start + after - time.perf_counter())
        tasks.append(asyncio.create_task(send(body, start + after)))
    return await asyncio.gather(*tasks)
