"""A batch file through the server's own application, in this process and without a socket.

So a line is validated, answered and refused exactly as a request over HTTP is. Knows lines and status codes; no models.
Invariant: the output is in the input's order, and what is held in memory does not grow with the file.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import httpx2

from mili.batch_file import BadLine, BatchLine, answer, refusal

# A slow line holds back the answers behind it: so many times the lines in flight may wait for it before no more are
# begun.
_LOOKAHEAD = 4


@dataclass(slots=True)
class BatchSummary:
    """What became of the lines of one run."""

    num_succeeded: int = 0
    num_failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, line: dict[str, Any]) -> None:
        """Add one output line."""
        response = line["response"]
        if response is None or response["status_code"] != 200:
            self.num_failed += 1
            return
        self.num_succeeded += 1
        self.prompt_tokens += response["body"]["usage"]["prompt_tokens"]
        self.completion_tokens += response["body"]["usage"]["completion_tokens"]


async def run_batch(
    app: Any,
    lines: Iterable[BatchLine | BadLine],
    write: Callable[[dict[str, Any]], None],
    *,
    max_in_flight: int,
    check_health: Callable[[], None],
    on_written: Callable[[], object],
) -> BatchSummary:
    """Answer every line.

    Args:
        app: The ASGI application.
        lines: What is still to be answered.
        write: Takes the output lines, in order.
        max_in_flight: Most requests at once.
        check_health: Asked when a request failed through no fault of its own. What it raises ends the run before that
            line is written, so that a later run repeats it.
        on_written: Called after each line.
    """
    summary = BatchSummary()
    slots = asyncio.Semaphore(max_in_flight)
    pending: deque[asyncio.Task[dict[str, Any]]] = deque()

    async def request(client: httpx2.AsyncClient, line: BatchLine | BadLine) -> dict[str, Any]:
        try:
            if isinstance(line, BadLine):
                return refusal(line)
            response = await client.post(line.url, content=line.body, headers={"content-type": "application/json"})
            if response.status_code >= 500:
                check_health()
            request_id = response.headers.get("x-request-id", "")
            return answer(line.custom_id, response.status_code, request_id, _json_body(response))
        finally:
            slots.release()

    async def write_first() -> None:
        output = await pending[0]
        pending.popleft()
        write(output)
        summary.count(output)
        on_written()

    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
        try:
            for line in lines:
                await slots.acquire()
                pending.append(asyncio.create_task(request(client, line)))
                while pending and (pending[0].done() or len(pending) > _LOOKAHEAD * max_in_flight):
                    await write_first()
            while pending:
                await write_first()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
    return summary


def _json_body(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except ValueError:  # the application failed before it could say so
        error = {"message": "internal error", "type": "server_error", "param": None, "code": None}
        return {"error": error}
