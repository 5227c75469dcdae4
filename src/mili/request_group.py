"""A prompt as the caller submitted it, with its `n` completions and the times at which things happened to it.

It gathers; it decides nothing. Invariant: it is finished exactly when all of its completions are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mili.batch import ForwardBatch
from mili.completion import Completion, token_logprobs
from mili.flight import Flight
from mili.grammar import GrammarCompiler, GrammarState
from mili.outputs import RequestMetrics, RequestOutput, TokenLogprobs
from mili.request import Request, ScheduledRequest
from mili.sampling import SamplerState, SamplingBatch, SamplingRow
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer

if TYPE_CHECKING:  # for its type only: importing the runner imports MAX
    from mili.runner import Runner


@dataclass(eq=False, slots=True)
class Child:
    """One of a group's completions on its way."""

    group: "RequestGroup"
    request: Request  # the scheduler's side
    completion: Completion  # the caller's side
    sampler: SamplerState
    grammar: GrammarState | None  # of its structured_outputs
    last_token_time: float | None = None
    failure: Exception | None = None  # of its grammar, before its next token

    def keep_prompt_logprobs(self, output: Any, row: int, position: int, tokenizer: Tokenizer) -> None:
        """Take what logit row `row` of the `StepOutput` says about the prompt's token at `position`."""
        params, kept = self.request.params, self.group.prompt_logprobs
        assert kept is not None and params.prompt_logprobs is not None
        named = tokenizer if params.detokenize else None
        kept[position] = token_logprobs(output, row, self.request.token_ids[position], params.prompt_logprobs, named)


@dataclass(eq=False, slots=True)
class RequestGroup:
    """Mutated by the engine only; times are seconds of the engine's clock."""

    id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    arrival_time: float
    children: list[Child] = field(init=False, default_factory=list)  # [n] in index order
    prompt_logprobs: list[TokenLogprobs | None] | None = field(init=False, default=None)  # one per prompt token
    first_scheduled_time: float | None = field(init=False, default=None)
    first_token_time: float | None = field(init=False, default=None)
    finished_time: float | None = field(init=False, default=None)
    failure: Exception | None = field(init=False, default=None)  # what took it down
    has_news: bool = field(init=False, default=False)  # something happened since the last output
    num_unfinished: int = field(init=False, default=0)

    def fork(
        self,
        max_len: int,
        seed: int,
        eos_token_ids: frozenset[int],
        bad_words: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
    ) -> None:
        """Make the `n` completions; completion i draws from the stream of seed + i."""
        params = self.params
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(self.prompt_token_ids)
        for index in range(params.n):
            # The prompt is the same for all: its log-probabilities are computed with the first completion only.
            own = params if index == 0 or params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
            request = Request(
                id=self.id if params.n == 1 else f"{self.id}-{index}",
                prompt_token_ids=self.prompt_token_ids,
                params=own,
                max_len=max_len,
                eos_token_ids=eos_token_ids,
                seed=(seed + index) % 2**64,
            )
            sampler = SamplerState(own, self.prompt_token_ids, request.stop_ids, bad_words, request.seed)
            grammar = grammars.start(params.structured_outputs, self.prompt_token_ids, request.stop_ids)
            self.children.append(Child(self, request, Completion(index, own, tokenizer), sampler, grammar))
        self.num_unfinished = params.n

    def output(self) -> RequestOutput:
        """The state now; the completions' deltas start anew."""
        metrics = RequestMetrics(
            arrival_time=self.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            finished_time=self.finished_time,
            num_preemptions=sum(child.request.num_preemptions for child in self.children),
        )
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=list(self.prompt_token_ids),
            prompt_logprobs=None if self.prompt_logprobs is None else self.prompt_logprobs.copy(),
            outputs=[child.completion.snapshot() for child in self.children],
            finished=self.num_unfinished == 0,
            num_cached_tokens=self.children[0].request.num_cached,
            metrics=metrics,
        )


def launch(
    plan: list[ScheduledRequest],
    children: Sequence[Child],
    runner: "Runner",
    page_size: int,
    now: float,
    grammars: GrammarCompiler,
    before: Flight | None = None,
    on_launch: Callable[[], None] | None = None,
) -> Flight:
    """Submit the step of `plan`, which has one request of each of `children`, maybe behind one that is in flight.

    Masks of what was drawn last are made while the device computes. What goes wrong with one is kept as the child's
    `failure`; the child takes part nevertheless, for its neighbours' sake. `on_launch` is called just before.
    """
    for child in children:
        if child.group.first_scheduled_time is None:
            child.group.first_scheduled_time = now
    batch = ForwardBatch.build(plan, page_size, {} if before is None else before.parts())
    rows = [-1] * len(plan)
    scored: list[tuple[int, Request, int]] = []
    is_steady = True
    for row, (index, kind, position) in enumerate(batch.logit_owners):
        child = children[index]
        if kind == "sample":
            rows[index] = row
            is_steady = is_steady and child.sampler.is_steady and child.grammar is None
        else:
            scored.append((row, child.request, position))

    def make_sampling() -> SamplingBatch:
        behind = [child for child in children if child.grammar is not None and child.grammar.is_behind]
        errors = grammars.advance([child.grammar for child in behind if child.grammar is not None])
        for child, error in zip(behind, errors, strict=True):
            child.failure = error
        return _sampling_batch(batch, children)

    is_masked = any(child.grammar is not None for child in children)
    sampling = None if is_masked else _sampling_batch(batch, children)
    after = before.pending if before is not None and batch.feeds else None
    if on_launch is not None:
        on_launch()
    pending = runner.submit(batch, make_sampling if sampling is None else sampling, after=after)
    return Flight(plan, rows, batch, sampling, pending, is_steady, before is not None, scored)


def _sampling_batch(batch: ForwardBatch, children: Sequence[Child]) -> SamplingBatch:
    """The rows of `batch`; each is made of its child alone."""
    rows = []
    for index, kind, position in batch.logit_owners:
        child = children[index]
        if kind == "sample":
            row = child.sampler.row(position)
            if child.grammar is not None and child.failure is None:
                row = row._replace(mask=child.grammar.mask)
            rows.append(row)
        else:
            params, token_ids = child.request.params, child.request.token_ids
            assert params.prompt_logprobs is not None
            rows.append(SamplingRow.scoring(token_ids[position], params.prompt_logprobs))
    return SamplingBatch.build(rows)
