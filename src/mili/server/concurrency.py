"""Waiting for work and for the client at once, and for several pieces of work at once.

Invariant: when one of these returns or raises, none of the work that it was given is still running.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from mili.server.errors import ClientDisconnected

T = TypeVar("T")


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves first; then raises ClientDisconnected.

    It runs in the caller's task: one of its own would be a quarter of what the loop does for a short request.
    """
    task, left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnected from None
        raise
    finally:
        watcher.cancel()


async def gather(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. The first exception cancels the others and is raised."""
    if len(works) == 1:  # the common case, without a task
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancel(tasks)


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What the streams yield, with their indices, as it comes; a stream is asked for more when its last was taken."""
    if len(streams) == 1:  # the common case, without two tasks an item
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    pending = {asyncio.create_task(_next(stream)): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                for item in task.result():
                    yield index, item
                    pending[asyncio.create_task(_next(streams[index]))] = index
    finally:
        await _cancel(list(pending))
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> list[T]:
    """The next item; none at the end."""
    async for item in stream:
        return [item]
    return []


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
