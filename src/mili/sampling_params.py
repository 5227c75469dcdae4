"""How one request wants its tokens chosen and where it wants to stop.

The field names are vLLM's. This module checks and normalises values; it does not know the vocabulary, the
end-of-sequence ids or the context length, so whatever needs those is checked when the request meets the engine.

Invariant: a ``SamplingParams`` that exists is valid on its own and never changes.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat, SupportsIndex

from mili.errors import RequestError
from mili.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20
"""Most alternatives per position that ``logprobs`` and ``prompt_logprobs`` may ask for."""

_GREEDY_BELOW = 1e-5
_TOKEN_ID_LIMIT = 2**31
_NUMBERS = (SupportsFloat, SupportsIndex)  # float() would read text as well


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Validated sampling options of one request; an unknown keyword is a ``TypeError``.

    Sequences are stored as tuples and numbers as plain ``int`` and ``float``. ``stop`` also takes one string, and
    ``stop``, ``stop_token_ids`` and ``bad_words`` also take ``None`` for "none".

    Attributes:
        n: Completions per prompt; more than one needs a temperature above 0.
        temperature: Divides the logits; 0 (and anything below 1e-5, as in vLLM) takes the most likely token.
        top_p: Keep the smallest set of most likely tokens whose probability reaches this, in (0, 1].
        top_k: Keep this many most likely tokens; 0 keeps all, -1 is accepted and stored as 0.
        min_p: Drop tokens less likely than this fraction of the most likely one, in [0, 1].
        presence_penalty: Subtracted from the logit of every token generated so far, in [-2, 2].
        frequency_penalty: Subtracted once for each time the token was generated, in [-2, 2].
        repetition_penalty: Divides a positive and multiplies a negative logit of every token of prompt or output; in
            [1e-6, 1e6], so that no logit leaves float32.
        seed: Makes the draws repeatable whatever else is in the batch; ``None`` lets the engine choose.
        stop: Strings that end generation; needs ``detokenize``.
        stop_token_ids: Token ids that end generation.
        include_stop_str_in_output: Leave the matched stop string in the text.
        ignore_eos: Go on after an end-of-sequence token.
        max_tokens: Most tokens to generate; ``None`` means up to the end of the context.
        min_tokens: End-of-sequence and stop ids cannot be drawn before this many tokens.
        logprobs: Alternatives to report per generated token, 0..20; 0 reports the chosen token alone.
        prompt_logprobs: The same for prompt tokens.
        logit_bias: Added to the logits of these token ids, in [-100, 100].
        bad_words: Strings that must not be generated as the tokens that spell them, at a text's start or after a space;
            as in vLLM, other tokens may spell them too.
        skip_special_tokens: Leave special tokens out of the text.
        detokenize: Produce text; ``False`` gives token ids only.
        structured_outputs: The form that the text must have; it ends where the form does, so ``ignore_eos`` and
            ``min_tokens`` contradict it.

    Raises:
        RequestError: A value is out of range or contradicts another; the message names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] | None = ()
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        self._set("n", _integer("n", self.n, 1))
        self._set("temperature", _number("temperature", self.temperature, 0.0, math.inf))
        self._set("top_p", _number("top_p", self.top_p, 0.0, 1.0, above=True))
        self._set("top_k", max(_integer("top_k", self.top_k, -1), 0))
        self._set("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        self._set("presence_penalty", _number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        self._set("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        self._set("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 1e-6, 1e6))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, -(2**63), 2**64 - 1))
        self._set("stop", _strings("stop", self.stop))
        self._set("stop_token_ids", tuple(_token_id("stop_token_ids", t) for t in _items("stop_token_ids", self)))
        self._set("bad_words", _strings("bad_words", self.bad_words))
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, 0))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                self._set(name, _integer(name, value, 0, MAX_LOGPROBS))
        if self.logit_bias is not None:
            self._set("logit_bias", _biases(self.logit_bias))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                f"structured_outputs must be StructuredOutputsParams, got {type(self.structured_outputs).__name__}"
            )
        self._check_contradictions()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _GREEDY_BELOW

    def _set(self, name: str, value: Any) -> None:
        """Stores a normalised value; only ``__post_init__`` may call it."""
        object.__setattr__(self, name, value)

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}): "
                "lower one or raise the other"
            )
        if self.stop and not self.detokenize:
            raise RequestError("stop needs text to match against: set detokenize=True or use stop_token_ids")
        if self.n > 1 and self.greedy:
            raise RequestError(
                f"n ({self.n}) must be 1 when temperature is 0, every completion would be the same: raise temperature"
            )
        if self.structured_outputs is not None and (self.ignore_eos or self.min_tokens):
            raise RequestError(
                f"{'ignore_eos' if self.ignore_eos else 'min_tokens'} contradicts structured_outputs, whose form "
                "decides where the text ends: leave one of them out"
            )


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    """``value`` as a finite float in [low, high], or in (low, high] with ``above``."""
    try:
        number = float(value) if isinstance(value, _NUMBERS) and not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):  # an array; an integer beyond every float
        number = math.nan
    if not math.isfinite(number) or number < low or number > high or (above and number == low):
        limit = f"{'above' if above else 'of at least'} {low:g}"
        if high < math.inf:
            limit = f"in {'(' if above else '['}{low:g}, {high:g}]"
        raise RequestError(f"{name} must be a finite number {limit}, got {value!r}")
    return number


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` as an int in [low, high]; floats and bools are refused."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise RequestError(f"{name} must be an integer {limit}, got {value!r}")
    return number


def _token_id(name: str, value: Any) -> int:
    return _integer(f"{name}: token id", value, 0, _TOKEN_ID_LIMIT - 1)


def _items(name: str, params: SamplingParams) -> Iterable[Any]:
    value = getattr(params, name)
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, got {value!r}")
    return value


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """One string, an iterable of strings or ``None`` as a tuple without empty strings."""
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Iterable) or isinstance(strings, bytes):
        raise RequestError(f"{name} must be a string or a list of strings, got {value!r}")
    strings = tuple(strings)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"{name} must hold non-empty strings, got {string!r}")
    return strings


def _biases(value: Any) -> dict[int, float]:
    """A private copy of ``logit_bias``; keys may be decimal strings, as JSON has no other kind of key."""
    if not isinstance(value, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers, got {value!r}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token_id = _token_id("logit_bias", int(key) if isinstance(key, str) and key.isdecimal() else key)
        biases[token_id] = _number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
    return biases
