"""`AsyncLLM`: a loaded model for asyncio programs, with many requests at once.

It checks requests and reads their streams; the engine runs on a thread of its own (`engine_thread`), so the event loop
never waits for it. A slow reader costs neither the engine time nor memory beyond its own text. Knows no HTTP.
Invariant: a reader that leaves early, by `aclose`, `break` or cancellation, takes its request with it.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mili.async_stream import Mailbox, Stream
from mili.config import EngineConfig
from mili.engine_thread import EngineThread
from mili.errors import ConfigError, EngineDeadError, RequestError
from mili.loaded_model import LoadedModel
from mili.outputs import RequestOutput
from mili.progress import StepStats
from mili.prompts import Messages, Prompt, PromptLike, match_params, parse_prompts
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer

_LONG_TEXT = 8192  # characters from which on tokenising is worth another thread
# An output costs a server some 50 us, on the CPU those of every core, for the kernels wait for each other.
_CPU_EVENT_RATE = 500.0  # a second; 16 for each of 32 streams, as smooth as one can read
_GPU_EVENT_RATE = 4000.0  # likewise for 256 streams


class AsyncLLM:
    """A model being served. Its methods may be called from any event loop, and from several."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        max_queue: int | None = None,
        max_event_rate: float | None = math.inf,
        on_step: Callable[[StepStats], None] | None = None,
        block_size: int = 16,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        """Load `model` and start the engine's thread; returns when requests can be served.

        Args:
            model: As for `LLM`, and so are `block_size`, `hf_overrides`, `revision` and `options`; what is wrong with
                them raises the same errors.
            max_queue: Most completions that may wait while `max_num_seqs` run; None for no limit.
            max_event_rate: Most outputs a second of all streams together, but for the first and the last of each; what
                comes in between is in the next one. Bounds the time spent on handing out tokens one by one. None for
                what suits a server: 500 on a CPU, whose cores compute as well, and 4000 with a GPU.
            on_step: Called on the engine's thread after every step; it must be quick and must not raise.
        """
        started = time.perf_counter()
        if max_queue is not None and max_queue < 0:
            raise ConfigError(f"max_queue must be at least 0, got {max_queue}")
        if max_event_rate is not None and not max_event_rate > 0:
            raise ConfigError(f"max_event_rate must be above 0 per second, got {max_event_rate}")
        config = EngineConfig(page_size=block_size, **options)
        self._loaded = LoadedModel(model, config, hf_overrides, revision)
        self.model = self._loaded.name
        self.model_config = self._loaded.config
        self.device = self._loaded.device
        self.dtype = self._loaded.dtype
        self.max_model_len = self._loaded.max_model_len
        self.max_num_seqs = config.max_num_seqs
        if max_event_rate is None:
            max_event_rate = _CPU_EVENT_RATE if self.device == "cpu" else _GPU_EVENT_RATE
        self.max_event_rate = max_event_rate
        self.memory = self._loaded.memory
        self._engine = self._loaded.engine
        self._ids = itertools.count()
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        limit = None if max_queue is None else config.max_num_seqs + max_queue
        self._thread = EngineThread(self._engine, limit, max_event_rate, on_step)
        self.startup_seconds = {**self._loaded.startup_seconds, "total": time.perf_counter() - started}

    async def generate(
        self, prompt: PromptLike | Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt, yielding as tokens come: `text` is all there is so far, `delta` what is new.

        A slow reader gets several tokens in one output. Leaving the loop early aborts the request. A `Prompt`, as
        `render_chat` returns it, is taken as it is; other forms are checked token by token.

        Raises:
            RequestError: The request can never be served, or its id is in use.
            QueueFullError: Too many requests are waiting.
            EngineDeadError: The engine has died.
            Exception: What the step raised that took the request down.
        """
        stream = await self._submit(prompt, sampling_params, request_id, final_only=False)
        try:
            while not stream.ended:
                yield await stream.next()
        finally:
            self._leave(stream)

    async def complete(
        self, prompt: PromptLike | Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> RequestOutput:
        """The finished output alone, which costs less than reading a stream; cancellation aborts the request.

        Raises what `generate` raises.
        """
        stream = await self._submit(prompt, sampling_params, request_id, final_only=True)
        try:
            return await stream.next()
        finally:
            self._leave(stream)

    async def abort(self, request_id: str) -> None:
        """End a request; its reader gets a last output with finish_reason "abort". Nothing for an unknown id."""
        self._thread.abort(request_id)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if the request can never be served; any thread may ask. A new grammar takes its time."""
        self._engine.check(prompt_token_ids, params)

    def render_chat(self, messages: Messages, **options: Any) -> Prompt:
        """The prompt of a conversation; `LoadedModel.render_chat` has the options. Any thread may ask."""
        return self._loaded.render_chat(messages, **options)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when no `sampling_params` are given: the model's generation_config.json."""
        return self._loaded.default_params

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if some stay because unfinished requests use them."""
        return await asyncio.wrap_future(self._thread.call(self._engine.reset_prefix_cache))

    def get_metrics(self) -> dict[str, float | dict[str, int]]:
        """As `Engine.metrics`; any thread may ask, and gets each value as of some moment during the call."""
        return self._engine.metrics()

    @property
    def num_unfinished(self) -> int:
        """Completions that were accepted and have not ended, `n` for each request."""
        return self._thread.num_unfinished

    @property
    def seconds_since_progress(self) -> float:
        """Since the last finished step; 0 while there is nothing to compute."""
        return time.monotonic() - self._thread.last_progress if self._thread.num_unfinished else 0.0

    def check_health(self) -> None:
        """Raise EngineDeadError if the engine has died; its cause is chained."""
        if self._thread.dead.done():
            raise self._thread.dead.result()

    async def wait_dead(self) -> EngineDeadError:
        """Return when the engine has died or was closed, with the reason."""
        return await asyncio.shield(asyncio.wrap_future(self._thread.dead))

    async def wait_idle(self) -> None:
        """Return when no request is unfinished."""
        await asyncio.wrap_future(self._thread.idle())

    def close(self) -> None:
        """End every request with EngineDeadError and free the device; any thread, safe to call again."""
        self._thread.close()
        self._loaded.close()

    async def _submit(
        self,
        prompt: PromptLike | Prompt,
        sampling_params: SamplingParams | None,
        request_id: str | None,
        *,
        final_only: bool,
    ) -> Stream:
        """Check a request and send it to the engine."""
        prompts = [prompt] if isinstance(prompt, Prompt) else parse_prompts(prompt)
        if len(prompts) != 1:
            raise RequestError(f"one prompt at a time, got {len(prompts)}: send them as requests of their own")
        (params,) = match_params(sampling_params, 1, self._loaded.default_params)
        parsed = prompts[0]
        if parsed.token_ids is None and len(parsed.text or "") >= _LONG_TEXT:
            parsed = await asyncio.to_thread(self._loaded.encode, parsed)
        else:
            parsed = self._loaded.encode(parsed)
        if params.structured_outputs is None:
            self.check(parsed.token_ids or (), params)
        else:
            await asyncio.to_thread(self.check, parsed.token_ids or (), params)
        loop = asyncio.get_running_loop()
        if loop not in self._mailboxes:
            self._mailboxes = {old: mailbox for old, mailbox in self._mailboxes.items() if not old.is_closed()}
            self._mailboxes[loop] = Mailbox(loop, self._thread.deliver)
        stream = Stream(request_id or f"async-{next(self._ids)}", params.n, self._mailboxes[loop], final_only)
        self._thread.submit(stream, parsed, params)
        return stream

    def _leave(self, stream: Stream) -> None:
        if not stream.ended:
            self._thread.leave(stream)
