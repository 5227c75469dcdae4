"""`Service`: what every route works with, and the one way from a route into the engine.

Knows requests by id and tells the observer what becomes of them; knows no JSON and no HTTP. Invariant: each
`request_started` is followed by exactly one of `finished`, `aborted` and `rejected`.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar, cast

from mili.async_llm import AsyncLLM
from mili.errors import EngineDeadError, QueueFullError, RequestError
from mili.outputs import FinishReason, RequestOutput
from mili.prompts import Prompt
from mili.sampling_params import SamplingParams
from mili.server.config import ServerConfig
from mili.server.errors import ApiError

_LONG_TEXT = 4096  # bytes or tokens from which on work goes to another thread: about 1 ms of tokenising

P = ParamSpec("P")
T = TypeVar("T")


class Observer(Protocol):
    """Hears what happens to requests, on the event loop; it must be quick and must not raise."""

    def request_started(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """A request passed all checks and goes to the engine."""

    def first_token(self, request_id: str, output: RequestOutput) -> None:
        """The first output of a stream; for a request that does not stream, just before `finished`."""

    def finished(self, request_id: str, output: RequestOutput, params: SamplingParams) -> None:
        """All completions ended by themselves; `output.metrics` has the times."""

    def aborted(self, request_id: str, reason: str) -> None:
        """Ended early: "disconnect" by the client, "error" in a step, "engine_dead"."""

    def rejected(self, request_id: str, reason: str) -> None:
        """Refused by the engine: "queue_full" or "invalid"."""


@dataclass(frozen=True, slots=True)
class Service:
    """The model being served, how, and who watches; one for an application."""

    llm: AsyncLLM
    config: ServerConfig
    observer: Observer
    model_name: str = field(init=False)  # under which clients address the model
    _in_flight: set[str] = field(init=False, default_factory=set)  # the engine's request ids

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_name", self.config.model_name(self.llm.model))

    def check_model(self, name: str | None) -> None:
        """Raise the 404 unless `name` is the served model; None means whatever is served."""
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist here: GET /v1/models lists what is served"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise what is wrong with a request before anything of it is begun."""
        num_tokens, limit = len(prompt_token_ids), self.llm.max_model_len
        if num_tokens >= limit:
            message = (
                f"the prompt has {num_tokens} tokens, and this model's context is {limit} for prompt and output "
                "together: shorten the prompt"
            )
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        capacity = self.llm.max_num_seqs + self.config.max_queue
        if params.n > capacity:
            raise ApiError(400, f"n is {params.n}, more than the {capacity} this server can hold at once", param="n")
        size = _LONG_TEXT if params.structured_outputs is not None else num_tokens  # compiling a grammar takes time
        await off_loop(size, self.llm.check, prompt_token_ids, params)

    async def stream(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as tokens come; closing the generator aborts the request."""
        with self._observed(prompt_token_ids, params, request_id) as engine_id:
            output: RequestOutput | None = None
            outputs = self.llm.generate(Prompt(None, prompt_token_ids), params, engine_id)
            async with aclosing(cast(AsyncGenerator[RequestOutput, None], outputs)):
                async for following in outputs:
                    if output is None:
                        self.observer.first_token(engine_id, following)
                    output = following
                    if not output.finished:
                        yield output
            assert output is not None
            self._finish(engine_id, output, params)
        yield output

    async def complete(self, prompt_token_ids: list[int], params: SamplingParams, request_id: str) -> RequestOutput:
        """The finished output; cancellation aborts the request."""
        with self._observed(prompt_token_ids, params, request_id) as engine_id:
            output = await self.llm.complete(Prompt(None, prompt_token_ids), params, engine_id)
            self.observer.first_token(engine_id, output)
            self._finish(engine_id, output, params)
        return output

    def _finish(self, request_id: str, output: RequestOutput, params: SamplingParams) -> None:
        if any(completion.finish_reason is FinishReason.ABORT for completion in output.outputs):
            raise ApiError(503, "the server aborted this request", type="service_unavailable", code="aborted")
        self.observer.finished(request_id, output, params)

    @contextmanager
    def _observed(self, prompt_token_ids: Sequence[int], params: SamplingParams, request_id: str) -> Iterator[str]:
        """Hold an id that no other request of the engine has, and tell the observer how it ends."""
        if request_id in self._in_flight:  # clients choose X-Request-Id
            request_id = f"{request_id}-{uuid.uuid4().hex}"
        self._in_flight.add(request_id)
        self.observer.request_started(request_id, prompt_token_ids, params)
        try:
            yield request_id
        except QueueFullError:
            self.observer.rejected(request_id, "queue_full")
            raise
        except RequestError:
            self.observer.rejected(request_id, "invalid")
            raise
        except EngineDeadError:
            self.observer.aborted(request_id, "engine_dead")
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self.observer.aborted(request_id, "disconnect")
            raise
        except BaseException:
            self.observer.aborted(request_id, "error")
            raise
        finally:
            self._in_flight.discard(request_id)


async def off_loop(size: int, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args)`, on another thread where `size` says that it takes long."""
    if size < _LONG_TEXT:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
