"""`Request`: the only mutable state of one completion on its way through the engine, and its place in a step's plan.

It knows token ids and sampling options; it knows no text, no logits and no clock.
Invariant: `token_ids` begins with the prompt and only ever grows, also across preemption; `num_computed` counts the
leading tokens whose keys and values are in the lease's pages, and is less than `len(token_ids)` while unfinished.

There is no prefill flag: a request needs `len(token_ids) - num_computed` tokens computed. One means decode, more means
(a chunk of) prefill.

    WAITING ──admitted──> RUNNING ──stop, length──> FINISHED
       ^                     │                         ^
       └─────preempted───────┘      abort, from either ┘
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from mili.cache import PageLease
from mili.outputs import FinishReason
from mili.sampling_params import SamplingParams


class RequestStatus(Enum):
    """Where a request is; see the drawing in the module docstring."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and one completion of it; mutated by the scheduler only."""

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_len: int  # most tokens, prompt and output together; above the prompt's length
    eos_token_ids: frozenset[int] = frozenset()  # the model's
    seed: int = 0  # of the random stream; params.seed or the engine's choice

    token_ids: list[int] = field(init=False)  # prompt + output
    num_computed: int = field(init=False, default=0)  # leading tokens whose keys and values are in the cache
    num_cached: int = field(init=False, default=0)  # of the prompt, reused from the tree when first admitted
    num_prompt_scored: int = field(init=False, default=0)  # prompt rows whose logits were computed: see below
    lease: PageLease | None = field(init=False, default=None)  # held while RUNNING
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)  # the stop id or string; None for EOS
    arrival: int = field(init=False, default=-1)  # order of `Scheduler.add`
    num_preemptions: int = field(init=False, default=0)
    stop_ids: frozenset[int] = field(init=False)  # every token id that ends the completion

    def __post_init__(self) -> None:
        assert 0 < len(self.prompt_token_ids) < self.max_len, "no prompt, or no room for one token after it"
        self.token_ids = list(self.prompt_token_ids)
        self.stop_ids = frozenset(self.params.stop_token_ids or ())
        if not self.params.ignore_eos:
            self.stop_ids |= self.eos_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far, in a new list."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_prompt_unscored(self) -> int:
        """Prompt positions whose logits are still to be computed for `prompt_logprobs`; 0 if they are not wanted.

        Position p scores the token p + 1, so the last position of the prompt is not among them. A position counts as
        scored once its step is recorded; a preempted request does not score it again.
        """
        if self.params.prompt_logprobs is None:
            return 0
        return len(self.prompt_token_ids) - 1 - self.num_prompt_scored

    @property
    def finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is RequestStatus.FINISHED


class InFlight(NamedTuple):
    """A request's part in a step that was submitted and is not recorded yet."""

    num_new_tokens: int
    logit_row: int  # of that step: the one its token is sampled from; -1 in mid-prompt


class ScheduledRequest(NamedTuple):
    """A request's part in one step: compute its next `num_new_tokens` tokens.

    Next after those that are computed when the step begins: `num_computed`, and what is in flight when it is planned.
    """

    request: Request
    num_new_tokens: int
