"""Which tokens a completion may draw next so that its text keeps to the form its request asks for.

    admission   GrammarCompiler.check(form), start ──> GrammarState, one for each completion
    a step      draw ──> GrammarState.append(token) ──> GrammarCompiler.advance ──> GrammarState.mask ──> next draw

The work is done by llguidance on the host; masks are bits over the model's vocabulary, as `SamplingRow.mask`. A model
that reasons first does so freely: the grammar begins after ``</think>``. Knows token ids, no text, batch or device.
Invariant: a mask depends on its own completion's tokens only, and never forbids everything.
"""

import functools
import json
import os
import threading
from collections.abc import Collection, Sequence
from enum import Enum, auto
from typing import Any, TypeAlias

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

from mili.errors import RequestError
from mili.grammar_trial import GrammarTrial
from mili.structured_outputs import StructuredOutputsParams
from mili.tokenizer import Tokenizer

__all__ = ["GrammarCompiler", "GrammarState"]

IntArray: TypeAlias = NDArray[np.int32]

_CACHED_GRAMMARS = 32
_COMPILE_SECONDS = 3.0
# A mask stops the whole batch: of the work that llguidance allows one, a tenth. An error prints no state of the parser.
_LIMITS: dict[str, Any] = {"step_max_items": 5000, "verbose_errors": False}
_MAX_THREADS = 8  # that fill masks: a mask takes some 12 us, so more have nothing to do
# JSON allows any amount of whitespace between its tokens; with a bound, a model that repeats spaces gets out again.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
# Where only one text can follow, llguidance would allow only the tokens it spells that text with, and spell all of it
# anew for each token: up to 0.1 s where the text is long. The model chooses the spelling instead.
_DIRECTIVE = '%llguidance {"no_forcing": true}'


class _Phase(Enum):
    """How the next token is bound."""

    GRAMMAR = auto()
    MAYBE_THINKING = auto()  # the first token may be <think> or begin the grammar
    THINKING = auto()  # free until </think>


class GrammarState:
    """One completion's place in its grammar; made by `GrammarCompiler.start`, mutated by the engine only."""

    def __init__(
        self, matcher: LLMatcher, phase: _Phase, think_ids: tuple[int, int], stop_ids: Collection[int]
    ) -> None:
        """Takes over `matcher`; `think_ids` are <think> and </think>."""
        self._matcher = matcher
        self._phase = phase
        self._open_id, self._close_id = think_ids
        self._stop_ids = tuple(stop_ids)
        self._undigested: int | None = None
        self._mask: IntArray | None = None

    @property
    def is_behind(self) -> bool:
        """Whether a token was appended that `GrammarCompiler.advance` has not seen."""
        return self._undigested is not None

    @property
    def mask(self) -> IntArray | None:
        """[ceil(V / 32)] token i is bit i % 32 of word i // 32; None while every token is allowed."""
        assert self._undigested is None, "a token was appended but the grammar not advanced"
        return self._mask

    def append(self, token_id: int) -> None:
        """Take the drawn token, which does not end the completion; `GrammarCompiler.advance` makes the next mask."""
        assert self._undigested is None
        self._undigested = token_id

    def digest(self) -> LLMatcher | None:
        """Bring the grammar up to the drawn token; the matcher to fill the next mask with, None if it needs none.

        Raises RequestError if the token is not one that the mask allowed.
        """
        token_id, self._undigested = self._undigested, None
        if self._phase is _Phase.THINKING:
            if token_id == self._close_id:
                self._phase = _Phase.GRAMMAR
        elif self._phase is _Phase.MAYBE_THINKING and token_id == self._open_id:
            self._phase = _Phase.THINKING
        elif token_id is not None:
            self._phase = _Phase.GRAMMAR
            if not self._matcher.consume_token(token_id):
                raise RequestError(
                    f"structured_outputs cannot go on after token {token_id}: {_first_line(self._matcher.get_error())} "
                    "(a token that the grammar forbids is drawn where bad_words leave no other)"
                )
        return None if self._phase is _Phase.THINKING else self._matcher

    def use(self, row: IntArray | None) -> None:
        """Make `row`, filled by the matcher of `digest`, the mask. Raises RequestError if the matcher gave up."""
        self._mask = row
        if row is None:
            return
        if self._matcher.is_error():
            raise RequestError(
                f"structured_outputs became too complex to go on: {_first_line(self._matcher.get_error())}"
            )
        if self._matcher.is_accepting():
            _allow(row, self._stop_ids)
        if self._phase is _Phase.MAYBE_THINKING:
            _allow(row, [self._open_id])


class GrammarCompiler:
    """Compiles the forms of one model's requests, and makes masks of their completions' states.

    `check` may be called from any thread, also while the engine's thread is in `start` or `advance`.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size` is the model's, padding included. Costs nothing until a request has a form."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        ids = {text: tokenizer.token_to_id(text) for text in ("<think>", "</think>", "<|im_start|>")}
        open_id, close_id, self._turn_id = ids.values()
        self._think_ids = None if open_id is None or close_id is None else (open_id, close_id)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._trial = GrammarTrial(self._describe_vocabulary, _COMPILE_SECONDS)
        self._compile = functools.lru_cache(maxsize=_CACHED_GRAMMARS)(self._compile_anew)

    def check(self, form: StructuredOutputsParams | None) -> None:
        """Raise RequestError if `form` is malformed, too large or too complex, or if no text has it.

        Recent forms are remembered, so that `start` need not compile them again. The first call reads the vocabulary,
        which takes about 1 s for that of Qwen3.
        """
        if form is None:
            return
        if not self._eos_token_ids:
            raise RequestError("structured_outputs needs a model with an end-of-sequence token, to end the text with")
        self._compile(form)

    def start(
        self, form: StructuredOutputsParams | None, prompt_token_ids: Sequence[int], stop_ids: Collection[int]
    ) -> GrammarState | None:
        """The state before the first draw of a completion that `stop_ids` end; None without a form.

        Raises as `check` does.
        """
        if form is None:
            return None
        self.check(form)
        matcher = self._compile(form).deep_copy()
        state = GrammarState(matcher, self._first_phase(prompt_token_ids), self._think_ids or (-1, -1), stop_ids)
        (error,) = self.advance([state])
        if error is not None:
            raise error
        return state

    def advance(self, states: Sequence[GrammarState]) -> list[Exception | None]:
        """Make the masks that follow the appended tokens; for each state what went wrong with it, None if nothing.

        The caller waits: to hand the work to a thread of Python's takes longer than most masks do.
        """
        errors: list[Exception | None] = [None] * len(states)
        if not states:
            return errors
        masks: list[IntArray | None] = [None] * len(states)
        matchers: list[tuple[LLMatcher, int]] = []
        rows = np.empty((len(states), -(-self._vocab_size // 32)), dtype=np.int32)  # [states, ceil(V / 32)]
        for index, state in enumerate(states):
            try:
                matcher = state.digest()
            except Exception as error:
                errors[index] = error
                continue
            if matcher is not None:
                matchers.append((matcher, index))
                masks[index] = rows[index]
        if matchers:
            try:
                fill_next_token_bitmask_par(self._executor, matchers, rows)
            except Exception as error:
                for _, index in matchers:
                    errors[index] = error
        for index, state in enumerate(states):
            if errors[index] is None:
                try:
                    state.use(masks[index])
                except Exception as error:
                    errors[index] = error
        return errors

    @functools.cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(min(_MAX_THREADS, os.cpu_count() or 1))

    def _first_phase(self, prompt_token_ids: Sequence[int]) -> _Phase:
        """Whether the prompt's last turn reasons: it does in an open <think>, and may where it has none."""
        if self._think_ids is None or self._turn_id not in prompt_token_ids:
            return _Phase.GRAMMAR
        for token_id in reversed(prompt_token_ids):
            if token_id == self._think_ids[0]:
                return _Phase.THINKING
            if token_id == self._think_ids[1]:
                return _Phase.GRAMMAR
            if token_id == self._turn_id:
                break
        return _Phase.MAYBE_THINKING

    def _compile_anew(self, form: StructuredOutputsParams) -> LLMatcher:
        """The grammar of `form` at its start, which is only ever copied."""
        grammar = LLMatcher.grammar_from_lark(_lark(form))
        if not self._trial.passes(grammar):
            raise RequestError(
                f"structured_outputs.{form.kind} is too large or too deep: compiling it took more than "
                f"{_COMPILE_SECONDS:g} s, or memory that is not there; give a simpler one"
            )
        matcher = LLMatcher(self._read_vocabulary(), grammar, log_level=0, limits=LLParserLimits(**_LIMITS))
        if matcher.is_error():
            raise RequestError(f"structured_outputs.{form.kind} cannot be used: {_first_line(matcher.get_error())}")
        # A grammar that has no text at all is found out by its first mask.
        fill_next_token_bitmask(matcher, np.empty((1, -(-self._vocab_size // 32)), dtype=np.int32))
        if matcher.is_error():
            raise RequestError(
                f"structured_outputs.{form.kind} cannot be used, no text has this form or it is too complex: "
                f"{_first_line(matcher.get_error())}"
            )
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
                )
            return self._vocabulary

    def _describe_vocabulary(self) -> dict[str, Any]:
        return {
            "tokenizer": self._tokenizer.to_json(),
            "size": self._vocab_size,
            "eos_token_ids": self._eos_token_ids,
            "limits": _LIMITS,
        }

    def close(self) -> None:
        """End the process in which grammars are tried out."""
        self._trial.close()


def _lark(form: StructuredOutputsParams) -> str:
    """The form as a grammar in llguidance's Lark syntax, in which all of them can be told not to force tokens."""
    if form.json_object or form.json is not None:
        schema = {"type": "object"} if form.json is None else json.loads(str(form.json))
        rule = f"start: %json {json.dumps({'x-guidance': {'whitespace_pattern': _WHITESPACE}} | schema)}"
    elif form.choice is not None:
        rule = f"start: /{regex_to_lark('|'.join(map(_escaped, form.choice)), '')}/"
    elif form.regex is not None:
        rule = f"start: /{regex_to_lark(form.regex, '')}/"
    else:
        assert form.grammar is not None
        rule = form.grammar
    return f"{rule}\n{_DIRECTIVE}"


def _escaped(text: str) -> str:
    """The regular expression that matches `text` only; `re.escape` writes escapes that Rust does not know."""
    return "".join(c if c.isalnum() or ord(c) >= 0x80 else f"\\x{ord(c):02x}" for c in text)


def _allow(row: IntArray, token_ids: Collection[int]) -> None:
    words = row.view(np.uint32)
    for token_id in token_ids:
        words[token_id >> 5] |= np.uint32(1 << (token_id & 31))


def _first_line(text: str) -> str:
    """An error of llguidance without the grammar that it quotes, which may be long."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    best = next((line for line in lines if line.startswith("error:")), lines[0])
    return best if len(best) <= 300 else f"{best[:300]}..."
