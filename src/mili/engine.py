"""The loop at the centre: `add` requests, `step` until they are done, `take` what came out.

    add ──> Scheduler ──plan──> ForwardBatch, SamplingBatch ──> Runner ──tokens──> Scheduler.record
                                                                         └──────> Completion: text, stop strings

It owns the scheduler, the KV cache's bookkeeping and each request's text; it knows no graph, no weights and no files.
Invariant: a request that ended, whether finished, aborted or taken down by a step that raised, holds no pages; and what
happens to one request never changes what another one generates.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mili.admission import RequestLimits, bad_word_ids, derived_seed
from mili.cache import KVCache
from mili.completion import token_logprobs
from mili.config import EngineConfig, ModelConfig
from mili.counters import Counters
from mili.errors import ConfigError, MiliError, RequestError
from mili.flight import Flight
from mili.grammar import GrammarCompiler
from mili.outputs import FinishReason, RequestOutput
from mili.progress import Progress, StepStats
from mili.request import Request
from mili.request_group import Child, RequestGroup, launch
from mili.sampling_params import SamplingParams
from mili.scheduler import Scheduler
from mili.tokenizer import Tokenizer

if TYPE_CHECKING:  # for their types only: importing the runner imports MAX
    from mili.runner import Runner, StepOutput


class Engine:
    """Serves many requests at once on one runner; not thread-safe."""

    def __init__(self, runner: "Runner", tokenizer: Tokenizer, model: ModelConfig, config: EngineConfig) -> None:
        """Take over `runner`, which nothing else may use.

        Raises ConfigError if its KV cache cannot hold one request of `max_model_len` tokens.
        """
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_token_ids = model.eos_token_ids
        self._seed = config.seed
        self._cache = KVCache(runner.num_pages, config.page_size, config.enable_prefix_caching)
        budget = config.resolve_max_num_batched_tokens(on_cpu=runner.device.is_host)
        self._scheduler = Scheduler(self._cache, config.max_num_seqs, budget)
        if runner.max_model_len > self._scheduler.max_request_len:
            raise ConfigError(
                f"the KV cache holds {self._scheduler.max_request_len - 1} tokens, too few for one request of "
                f"max_model_len {runner.max_model_len}: raise kv_cache_memory_bytes or lower max_model_len"
            )
        self.limits = RequestLimits(model.vocab_size, runner.max_model_len)
        self._grammars = GrammarCompiler(tokenizer, model.vocab_size, model.eos_token_ids)
        self._groups: dict[str, RequestGroup] = {}
        self._children: dict[Request, Child] = {}  # the unfinished ones
        self._counters = Counters()
        self._flight: Flight | None = None  # submitted and not taken in
        self._ids, self._num_added = itertools.count(), 0
        self._clock_offset = time.time() - time.monotonic()

    @property
    def has_unfinished(self) -> bool:
        """Whether another `step` has something to do."""
        return self._scheduler.has_unfinished

    @property
    def looks_ahead(self) -> bool:
        """Whether a step may be under way before `step` is called."""
        return self._runner.looks_ahead

    @property
    def num_wanted_tokens(self) -> int:
        """How many more tokens of prompts the next two steps might find room for; 0 or less if enough wait."""
        waiting = self._scheduler.waiting
        if len(waiting) >= self._scheduler.max_num_seqs:  # as many as a step can admit; not counted again at each step
            return 0
        return 2 * self._scheduler.max_num_batched_tokens - sum(len(request.token_ids) for request in waiting)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError if the request can never be served; from any thread. New structured_outputs take ms."""
        self.limits.check(prompt_token_ids, params)
        self._grammars.check(params.structured_outputs)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        checked_at: float | None = None,
    ) -> str:
        """Queue a request and return its id, a fresh one unless given.

        It arrives now, or did so at `checked_at` if `check` let it pass then. Raises RequestError, and queues nothing,
        if the id is in use or the request can never be served.
        """
        if checked_at is None:
            self.check(prompt_token_ids, params)
            checked_at = self.now()
        if request_id is None:
            request_id = next(i for i in map(str, self._ids) if i not in self._groups)
        elif request_id in self._groups:
            raise RequestError(f"request_id {request_id!r} is in use: choose another or leave it out")
        seed = derived_seed(self._seed, self._num_added) if params.seed is None else params.seed
        self._num_added += 1
        group = RequestGroup(request_id, prompt, tuple(prompt_token_ids), params, arrival_time=checked_at)
        group.fork(
            self.limits.max_len(len(prompt_token_ids), params),
            seed,
            self._eos_token_ids,
            bad_word_ids(params.bad_words or (), self._tokenizer),
            self._tokenizer,
            self._grammars,
        )
        self._groups[request_id] = group
        for child in group.children:
            self._children[child.request] = child
            self._scheduler.add(child.request)
        return request_id

    def step(self, on_launch: Callable[[], None] | None = None) -> Progress:
        """Compute one step of whatever is running and waiting; nothing to do is no error.

        `on_launch` is called when the host is ready for the device, unless the step is under way already. An exception
        ends the requests that took part in the step, or the one whose text or log-probabilities raised it, and `take`
        raises it for them; the others go on. KeyboardInterrupt and its like end them too, and then leave this method.
        """
        # --8<-- [start:step]
        flight, self._flight = self._flight, None  # the step that was enqueued while the one before it was running
        if flight is not None and not flight.drop_finished():
            flight = None
        plan = self._scheduler.schedule() if flight is None else flight.plan
        children = [self._children[request] for request, _ in plan]
        if not plan:
            return Progress([], [])
        try:
            if flight is None:
                now, page_size = self.now(), self._cache.page_size
                flight = launch(plan, children, self._runner, page_size, now, self._grammars, on_launch=on_launch)
            if self._runner.looks_ahead:  # the device has the next step before the host waits for this one
                self._flight = flight.follow_up(self._runner, self._scheduler) or self._launch_behind(flight)
            return self._take_in(flight, flight.pending.fetch())
        # --8<-- [end:step]
        except Exception as error:
            return Progress([], self._fail(children, error))
        except BaseException:
            self._fail(children, MiliError("the step of this request was interrupted"))
            raise

    def rest(self) -> None:
        """Nothing is left to step for now: use no more of the machine than memory until there is."""
        self._runner.rest()

    def has_news(self, request_id: str) -> bool:
        """Whether `take` would show, or raise, something new; KeyError for an unknown id."""
        return self._groups[request_id].has_news

    def take(self, request_id: str) -> RequestOutput:
        """The request's state now, with each completion's delta since the last call; a finished request is forgotten.

        Raises what the step raised that took the request down, and KeyError for an unknown id.
        """
        group = self._groups[request_id]
        if group.num_unfinished == 0:
            del self._groups[request_id]
        if group.failure is not None:
            raise group.failure
        group.has_news = False
        return group.output()

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in whatever state it is and forget it; returns how far it came, None for an unknown id."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return None
        self._end(group, FinishReason.ABORT)
        return group.output()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if some stay because unfinished requests use them."""
        self._cache.reset()
        return self._cache.num_cached_pages == 0

    def metrics(self) -> dict[str, float | dict[str, int]]:
        """Gauges and totals under vLLM's names; `kv_cache_usage_perc` is a share, 0 to 1."""
        scheduler = self._scheduler
        return {
            "num_requests_running": len(scheduler.running),
            "num_requests_waiting": len(scheduler.waiting),
            "kv_cache_usage_perc": self._cache.usage,
            "prefix_cache_queries_total": scheduler.num_queried_tokens,
            "prefix_cache_hits_total": scheduler.num_cached_tokens,
            "num_preemptions_total": scheduler.num_preemptions,
            **self._counters.as_dict(),
        }

    def close(self) -> None:
        """End every request and free the device."""
        for request_id in list(self._groups):
            self.abort(request_id)
        self._flight = None
        self._grammars.close()
        self._runner.close()

    def _launch_behind(self, flight: Flight) -> Flight | None:
        """Plan and enqueue the step after `flight`, or return None if that has to wait until it is taken in."""
        plan = self._scheduler.schedule(flight.parts()) if flight.is_steady else []
        if not plan:
            return None
        children = [self._children[request] for request, _ in plan]
        return launch(plan, children, self._runner, self._cache.page_size, self.now(), self._grammars, flight)

    def _take_in(self, flight: Flight, output: "StepOutput") -> Progress:
        """Hand the sampled tokens to the scheduler, then to the completions."""
        now = self.now()
        rows = [row for row in flight.rows if row >= 0]
        tokens: list[int] = output.token_ids[rows].tolist()
        received = self._scheduler.record(flight.plan, tokens)
        for row, request, position in flight.scored:
            if (child := self._children.get(request)) is not None:
                child.keep_prompt_logprobs(output, row, position, self._tokenizer)
        advanced: dict[str, None] = {}  # a set in order
        finished, latencies = list[str](), list[float]()
        for request, row, token in zip(received, rows, tokens, strict=True):
            child = self._children.get(request)
            if child is None:  # taken down a moment ago with another completion of its group
                continue
            group = child.group
            if group.first_token_time is None:
                group.first_token_time = now
                self._counters.prompt_tokens += request.num_prompt_tokens
                self._counters.prompt_tokens_cached += request.num_cached
            if child.last_token_time is not None:
                latencies.append(now - child.last_token_time)
            child.last_token_time = now
            try:
                self._receive(child, output, row, token)
            except Exception as error:  # one request's text must not take the others down
                finished += self._fail([child], error)
                continue
            advanced[group.id] = None
            group.has_news = True
            if group.num_unfinished == 0:
                group.finished_time = now
                finished.append(group.id)
        self._counters.generation_tokens += len(tokens)
        return Progress(list(advanced), finished, StepStats(sum(num_new for _, num_new in flight.plan), latencies))

    def _receive(self, child: Child, output: "StepOutput", row: int, token: int) -> None:
        """Turn a completion's next token into text; it may end with it. Raises what went wrong with its mask."""
        if child.failure is not None:
            raise child.failure
        request, completion = child.request, child.completion
        child.sampler.append(token)
        if request.finish_reason is FinishReason.STOP:
            completion.append_stop_token(token)
        elif completion.append(token) and not request.finished:
            self._scheduler.finish(request, FinishReason.STOP)
        if (num_logprobs := request.params.logprobs) is not None:
            named = self._tokenizer if request.params.detokenize else None
            completion.add_logprobs(token_logprobs(output, row, token, num_logprobs, named))
        if child.grammar is not None:
            child.grammar.append(token)
        if request.finish_reason is not None:
            completion.finish(request.finish_reason, request.stop_reason)
            self._forget(child)

    def _fail(self, children: Iterable[Child], error: Exception) -> list[str]:
        """End the groups of `children`, which an exception took down; returns their ids."""
        groups = {child.group: None for child in children if child.group.num_unfinished}
        for group in groups:
            group.failure, group.has_news = error, True
            self._counters.failed += group.num_unfinished
            self._end(group, None)
        return [group.id for group in groups]

    def _end(self, group: RequestGroup, reason: FinishReason | None) -> None:
        """Take the group's unfinished requests out of the scheduler, which frees their pages."""
        for child in group.children:
            if child.request in self._children:
                self._scheduler.abort(child.request)
                if reason is not None:  # else nobody sees its text, and closing it may be what raised
                    child.completion.finish(reason, None)
                self._forget(child)
        group.finished_time = self.now()

    def _forget(self, child: Child) -> None:
        del self._children[child.request]
        child.group.num_unfinished -= 1
        if child.completion.finish_reason is not None:
            self._counters.finished[child.completion.finish_reason] += 1

    def now(self) -> float:
        """Seconds of the clock that requests are timed with: Unix time, but it never jumps."""
        return time.monotonic() + self._clock_offset
