"""The engine on a thread of its own: takes commands, steps, and sends outputs to the readers' event loops.

    event loops ──commands──> engine thread: step, step, ...
         ^                          │
         └── outputs, one call a ───┘
             step and loop

Everything that touches the engine is a command, run between two steps; the thread sleeps on their queue while there is
nothing to compute. All streams together get at most `max_event_rate` outputs a second, first and last ones aside, and
who has waited longest is first: an output of one token costs its reader's thread about as much as one of ten. A loop
that is still busy gets later outputs together.

Knows no HTTP and no text. Invariants: a request that was accepted ends exactly once, with a last output or with an
exception; one that was aborted holds no pages after the step that is running.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from mili.async_stream import News, Stream
from mili.engine import Engine
from mili.errors import EngineDeadError, QueueFullError, RequestError
from mili.progress import Progress, StepStats
from mili.prompts import Prompt
from mili.sampling_params import SamplingParams

MAX_FAILED_STEPS = 5
"""So many steps in a row that raise, and the engine counts as dead: it is not the requests' fault any more."""

_ROUND = 32  # streams that are sent something at a time: each time wakes the loop, and more would hold up the engine
_Result = TypeVar("_Result")
_LOG = logging.getLogger("mili.engine")


class EngineThread:
    """Owns `engine` until `close`. Its public methods may be called from any thread."""

    def __init__(
        self, engine: Engine, limit: int | None, max_event_rate: float, on_step: Callable[[StepStats], None] | None
    ) -> None:
        """Start the thread; `limit` is the most completions that may be unfinished at once; a rate may be inf."""
        self._engine = engine
        self._limit = limit
        self._interval = 1 / max_event_rate  # seconds between two outputs
        self._next_due = 0.0  # from then on another output may be sent
        self._on_step = on_step
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._streams: dict[str, Stream] = {}  # of the unfinished requests; who was sent something last is last
        self._fresh: set[str] = set()  # of those, the ones whose readers wait for the first of several outputs
        self._urgent: dict[str, None] = {}  # a set in order: of those, the ones with an output to deliver at once
        self._last_error: BaseException | None = None
        self._lock = threading.Lock()  # guards what follows, and that a command is queued before the thread's end
        self._num_unfinished = 0
        self._waiting_for_idle: list[Future[None]] = []
        self._closing = False
        self.dead: Future[EngineDeadError] = Future()  # done once nothing will be served any more
        self.last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mili-engine", daemon=True)
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        """Completions that were accepted and have not ended, `n` for each request."""
        return self._num_unfinished

    def submit(self, stream: Stream, prompt: Prompt, params: SamplingParams) -> None:
        """Accept a request that `Engine.check` let pass; its outputs go to `stream`.

        Raises QueueFullError, EngineDeadError or RequestError.
        """
        with self._lock:
            if self.dead.done():
                raise self.dead.result()
            total = self._num_unfinished + stream.n
            if self._limit is not None and total > self._limit:
                if stream.n > self._limit:
                    raise RequestError(f"n is {stream.n}, but at most {self._limit} completions can wait: lower n")
                raise QueueFullError(
                    f"{self._num_unfinished} completions are running or waiting, the limit is {self._limit}: "
                    "try again later"
                )
            self._num_unfinished = total
            self._commands.put(partial(self._add, stream, prompt, params, self._engine.now()))

    def abort(self, request_id: str) -> None:
        """End a request after the step that is running; its reader gets a last output with finish_reason "abort"."""
        self._commands.put(partial(self._abort, request_id))

    def leave(self, stream: Stream) -> None:
        """The reader of `stream` has gone: end its request, if it has not ended, and never another one with its id."""
        self._commands.put(partial(self._end_unread, stream))

    def call(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """Run `function` between two steps."""
        result: Future[_Result] = Future()

        def command() -> None:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(function())
                except Exception as error:
                    result.set_exception(error)

        with self._lock:
            if self.dead.done():
                raise self.dead.result()
            self._commands.put(command)
        return result

    def deliver(self) -> None:
        """A reader's loop has room: send it what was kept back, even if no step follows."""
        if self._urgent:
            self._commands.put(self._deliver)

    def idle(self) -> "Future[None]":
        """Done once nothing is unfinished."""
        idle: Future[None] = Future()
        with self._lock:
            if self._num_unfinished:
                self._waiting_for_idle.append(idle)
            else:
                idle.set_result(None)
        return idle

    def close(self) -> None:
        """End every request with EngineDeadError and the thread; the engine stays open. Safe to call again."""
        self._closing = True
        self._commands.put(lambda: None)
        self._thread.join()

    # --- on the thread ---

    def _run(self) -> None:
        try:
            self._serve()
            dead = EngineDeadError("the engine was closed")
        except BaseException as error:
            _LOG.exception("the engine has died")
            dead = EngineDeadError(f"the engine has died: {type(error).__name__}: {error}")
            dead.__cause__ = error
        with self._lock:
            self.dead.set_result(dead)
        self._run_commands()
        for request_id in list(self._streams):
            self._send({request_id: dead})

    def _serve(self) -> None:
        engine, num_failed = self._engine, 0
        while not self._closing:
            if not engine.has_unfinished:
                engine.rest()
                self._commands.get()()  # sleeps here
                self.last_progress = time.monotonic()
            self._run_commands()
            if not engine.has_unfinished:
                continue
            # Outputs are sent when the device has its next step, if it waits for the host until then: a loop that
            # wakes earlier takes Python's lock from this thread, and the device waits for both.
            progress = engine.step(self._deliver)
            self.last_progress = time.monotonic()
            self._note(progress)
            if engine.looks_ahead or not progress.stats.num_tokens or not engine.has_unfinished:
                self._deliver()
            if progress.stats.num_tokens:
                num_failed = 0
            elif (num_failed := num_failed + 1) == MAX_FAILED_STEPS:
                raise RuntimeError(f"{num_failed} steps in a row failed") from self._last_error
            if self._on_step is not None:
                self._on_step(progress.stats)

    def _run_commands(self) -> None:
        try:
            while True:
                self._commands.get_nowait()()
        except Empty:
            pass

    def _add(self, stream: Stream, prompt: Prompt, params: SamplingParams, arrived: float) -> None:
        request_id = stream.request_id
        try:
            if self.dead.done():
                raise self.dead.result()
            self._engine.add(
                prompt.token_ids or (), params, prompt=prompt.text, request_id=request_id, checked_at=arrived
            )
        except Exception as error:
            self._count_out(stream.n)
            stream.mailbox.post([(stream, error)])
        else:
            self._streams[request_id] = stream
            if not stream.final_only:
                self._fresh.add(request_id)

    def _abort(self, request_id: str) -> None:
        output = self._engine.abort(request_id)
        if output is not None:
            self._send({request_id: output})

    def _end_unread(self, stream: Stream) -> None:
        if self._streams.get(stream.request_id) is stream:
            self._abort(stream.request_id)

    def _note(self, progress: Progress) -> None:
        """Remember whose first or last output a step brought."""
        if self._fresh:
            begun = [request_id for request_id in progress.advanced if request_id in self._fresh]
            self._fresh.difference_update(begun)
            self._urgent.update(dict.fromkeys(begun))
        self._urgent.update(dict.fromkeys(progress.finished))

    def _deliver(self) -> None:
        """Take the outputs of the readers whose loops have room, and send them."""
        now = time.monotonic()
        num = len(self._streams)
        # Of the time that nobody used, so much is left that every stream may have an output now.
        self._next_due = max(self._next_due, now - self._interval * num)
        is_round = self._next_due <= now - self._interval * min(num, _ROUND)
        ready: dict[str, News] = {}
        for request_id in self._streams if is_round else self._urgent:
            stream = self._streams[request_id]
            if not stream.mailbox.has_room:
                continue
            if request_id not in self._urgent:
                if stream.final_only or self._next_due > now or not self._engine.has_news(request_id):
                    continue
                self._next_due += self._interval
            try:
                ready[request_id] = self._engine.take(request_id)
            except Exception as error:
                self._last_error = ready[request_id] = error
        self._send(ready)

    def _send(self, ready: dict[str, News]) -> None:
        """Send outputs to their readers; forgets the streams that end with them."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, News]]] = {}
        for request_id, news in ready.items():
            self._urgent.pop(request_id, None)
            stream = self._streams.pop(request_id)
            batches.setdefault(stream.mailbox.loop, []).append((stream, news))
            if isinstance(news, BaseException) or news.finished:
                self._fresh.discard(request_id)
                self._count_out(stream.n)
            else:
                self._streams[request_id] = stream
        for batch in batches.values():
            if not batch[0][0].mailbox.post(batch):
                for stream, _ in batch:  # the loop is closed: nobody reads any more
                    self.leave(stream)

    def _count_out(self, n: int) -> None:
        with self._lock:
            self._num_unfinished -= n
            if self._num_unfinished:
                return
            waiting, self._waiting_for_idle = self._waiting_for_idle, []
        for idle in waiting:
            if idle.set_running_or_notify_cancel():
                idle.set_result(None)
