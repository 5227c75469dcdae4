"""A prompt as the caller submitted it, with its `n` completions and the times at which things happened to it.

It gathers; it decides nothing. Invariant: it is finished exactly when all of its completions are.
"""

from dataclasses import dataclass, field

from mili.completion import Completion
from mili.outputs import RequestMetrics, RequestOutput, TokenLogprobs
from mili.request import Request


@dataclass(eq=False, slots=True)
class RequestGroup:
    """Mutated by the engine only; times are seconds of the engine's clock."""

    id: str
    prompt: str | None
    requests: list[Request]  # [n] the scheduler's side of each completion
    completions: list[Completion]  # [n] the caller's side
    prompt_logprobs: list[TokenLogprobs | None] | None  # one per prompt token, filled as they are computed
    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    failure: Exception | None = None  # of the step that took it down
    has_news: bool = False  # something happened since the last output
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.requests)

    def output(self) -> RequestOutput:
        """The state now; the completions' deltas start anew."""
        first = self.requests[0]
        metrics = RequestMetrics(
            arrival_time=self.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            finished_time=self.finished_time,
            num_preemptions=sum(request.num_preemptions for request in self.requests),
        )
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=list(first.prompt_token_ids),
            prompt_logprobs=None if self.prompt_logprobs is None else self.prompt_logprobs.copy(),
            outputs=[completion.snapshot() for completion in self.completions],
            finished=self.num_unfinished == 0,
            num_cached_tokens=first.num_cached,
            metrics=metrics,
        )
