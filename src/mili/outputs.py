"""What a caller gets back: `RequestOutput` and its parts, attribute-compatible with vLLM's.

Plain data at the bottom of the level table. It does not know how tokens are made, decoded or scheduled.
Invariant: an output is a snapshot; nothing in it changes after it was handed out, so a stream's earlier outputs stay as
they were.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias


class FinishReason(StrEnum):
    """Why a completion ended. A `StrEnum`, so `finish_reason == "stop"` holds as it does in vLLM."""

    STOP = "stop"  # end-of-sequence token, a stop token id or a stop string: see CompletionOutput.stop_reason
    LENGTH = "length"  # max_tokens, or the end of the context
    ABORT = "abort"  # aborted by the caller


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's probability under the model, before any penalty, bias, temperature or filter."""

    logprob: float  # natural logarithm, computed in float32
    rank: int | None = None  # 1 + the number of tokens with a strictly greater logit
    decoded_token: str | None = None  # None with detokenize=False


# One entry per token: the token itself and the `logprobs` most likely ones, by token id.
TokenLogprobs: TypeAlias = dict[int, Logprob]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt; a request with n > 1 has n of them, in `index` order."""

    index: int
    text: str  # all text so far; while unfinished, without the characters that may begin a stop string
    token_ids: list[int]  # all generated ids so far, a stop token included
    cumulative_logprob: float | None = None  # sum over token_ids; None unless logprobs were asked for
    logprobs: list[TokenLogprobs] | None = None  # one per generated token
    finish_reason: FinishReason | None = None  # None while running
    stop_reason: int | str | None = None  # the stop token id or stop string that matched; None for the model's own EOS
    delta: str = ""  # the text that is new since the previous output of the same stream; `text` when not streaming

    @property
    def finished(self) -> bool:
        """True once no more tokens will come."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request: Unix seconds, taken from a monotonic clock so that differences are safe."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0  # times its pages were released and recomputed, summed over the n completions

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step it took part in; None while it waits."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token; None before it."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its completions."""

    request_id: str
    prompt: str | None  # None when the prompt came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # one per prompt token; the first is None
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were reused from the prefix cache
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        """`outputs[0].text`."""
        return self.outputs[0].text

    @property
    def delta(self) -> str:
        """`outputs[0].delta`: what a stream prints."""
        return self.outputs[0].delta
