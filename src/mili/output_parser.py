"""One completion's token ids to an assistant message: reasoning, content and tool calls, as they arrive.

    ids -> MarkedText -> text and markers -> OutputParser -> deltas -> Message

The markers are the tokens `<think>`, `</think>`, `<tool_call>` and `</tool_call>`, known by their ids: the same
characters spelt in other tokens are text, and a tokenizer without these tokens gives plain content. Knows nothing of
HTTP, engines or requests; stop strings were found by the engine, which says how much of the text may be shown.
Invariant: the message depends on the ids and the final text, never on how they were cut into pieces, so a stream adds
up to the one-shot answer. To keep it, nothing once given is taken back:

- Reasoning is open at the start when the prompt's assistant turn leaves `<think>` open, else from a `<think>` before
  any content or call, to `</think>` or to the end. A `<tool_call>` in it is text: the model is still thinking.
- A call stands once its name and the opening brace of its arguments have been read, and its arguments are handed on as
  written: cut short where generation ends, not repaired. Before that point anything wrong with the body, its end
  included, makes the whole of it content, markers too.
- Inside a JSON string of a call a marker is text. Elsewhere `<tool_call>` also ends the call before it.
- After the object of a call, braces and white space are dropped; other text ends the call and is content.
- A marker with no meaning where it stands is text. A second `<think>` that begins the reasoning is dropped.
- A marker that a stop string cuts or hides still counts when all text before it is shown; the text of it that is shown
  counts for a marker taken as text.
- Newlines around reasoning, before a standing call, and before the first content after a marker are dropped. All other
  content equals the engine's text.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from itertools import takewhile
from typing import TypeAlias

from mili.marked_text import MarkedText
from mili.tokenizer import Tokenizer
from mili.tool_call_scanner import ToolCallScanner


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; calls are numbered from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: a slice of the JSON text as generated."""

    index: int
    text: str


ParsedDelta: TypeAlias = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments


@dataclass(slots=True)
class ToolCall:
    """One call of a message. `arguments` is JSON text, which the model may have got wrong."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    """The deltas so far, added up. A channel that got no text is None."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    def feed(self, deltas: Iterable[ParsedDelta]) -> None:
        """Add `deltas`, in the order the parser gave them."""
        for delta in deltas:
            match delta:
                case ReasoningDelta(text):
                    self.reasoning = (self.reasoning or "") + text
                case ContentDelta(text):
                    self.content = (self.content or "") + text
                case ToolCallStart(_, call_id, name):
                    self.tool_calls.append(ToolCall(call_id, name))
                case ToolCallArguments(index, text):
                    self.tool_calls[index].arguments += text


class _Marker(StrEnum):
    THINK = "<think>"
    END_THINK = "</think>"
    CALL = "<tool_call>"
    END_CALL = "</tool_call>"


class _State(Enum):
    CONTENT = auto()
    REASONING = auto()
    CALL = auto()  # in the body of a call
    TAIL = auto()  # past the object of a call that stands, before its closing marker


def reasoning_is_open(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> bool:
    """Whether the last turn of a chat prompt ends inside `<think>`; False for a prompt without turns."""
    turn, think, end_think = map(tokenizer.token_to_id, ("<|im_start|>", _Marker.THINK, _Marker.END_THINK))
    if turn not in prompt_token_ids:
        return False
    tail = takewhile(lambda token_id: token_id != turn, reversed(prompt_token_ids))
    return next((token_id for token_id in tail if token_id in (think, end_think)), None) == think


class OutputParser:
    """Parses one completion; serves streams and whole answers alike."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        parse_reasoning: bool = True,
        parse_tools: bool,
        skip_special_tokens: bool = True,
    ) -> None:
        """A kind of markers that is not parsed is text; `skip_special_tokens` is that of the request."""
        wanted = {_Marker.THINK, _Marker.END_THINK} if parse_reasoning else set()
        wanted |= {_Marker.CALL, _Marker.END_CALL} if parse_tools else set()
        ids = {marker: tokenizer.token_to_id(marker) for marker in wanted}
        markers = {token_id: marker for marker, token_id in ids.items() if token_id is not None}
        self._text = MarkedText(tokenizer, markers, skip_special_tokens=skip_special_tokens)
        self._deltas: list[ParsedDelta] = []
        reasoning = parse_reasoning and reasoning_is_open(tokenizer, prompt_token_ids)
        self._state = _State.REASONING if reasoning else _State.CONTENT
        self._held = 0  # newlines not shown yet, which are dropped if a marker follows
        self._strip = reasoning  # newlines that come next are dropped
        self._has_content = False
        self._num_calls = 0
        self._body = ""  # the call at hand as text, with what was held before it; until it stands
        self._scanner = ToolCallScanner()
        self._num_reasoning_tokens = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of reasoning so far, without its two markers."""
        return self._num_reasoning_tokens

    def feed(self, token_ids: Sequence[int], text_len: int, finished: bool = False) -> list[ParsedDelta]:
        """Take the new `token_ids` and return what they add to the message.

        `text_len` is the length of the engine's text now, which bounds what is shown. With `finished` the rest is
        released, and no call may follow.
        """
        for piece in self._text.feed(token_ids, text_len, finished):
            if piece.marker is None or not self._act_on(piece.marker, piece.text):
                if self._state is _State.REASONING:
                    self._num_reasoning_tokens += piece.num_tokens
                self._take_text(piece.text)
        if finished:
            self._end_call()
            if self._state is not _State.REASONING and self._held:
                self._show("\n" * self._held)
        deltas, self._deltas = self._deltas, []
        return deltas

    def _act_on(self, marker: str, shown: str) -> bool:
        """Change state; False where the marker is text."""
        match self._state, marker:
            case _State.REASONING, _Marker.THINK:
                return self._strip  # nothing was said yet
            case _State.REASONING, _Marker.END_THINK:
                self._state, self._held, self._strip = _State.CONTENT, 0, True
                return True
            case _State.CONTENT, _Marker.THINK if not self._has_content and not self._num_calls:
                self._state, self._held, self._strip = _State.REASONING, 0, True
                return True
            case _State.CALL, _ if self._scanner.in_string:
                return False
            case _State.CALL | _State.TAIL, _Marker.END_CALL:
                return self._end_call()
            case _State.CONTENT | _State.CALL | _State.TAIL, _Marker.CALL:
                self._end_call()
                self._state, self._scanner = _State.CALL, ToolCallScanner()
                self._body, self._held = "\n" * self._held + shown, 0
                return True
        return False

    def _take_text(self, text: str) -> None:
        if self._state is _State.CALL:
            self._take_body(text)
        elif self._state is _State.TAIL:
            self._take_tail(text)
        else:
            self._take_prose(text)

    def _take_prose(self, text: str) -> None:
        if self._strip:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        if shown:
            self._strip = False
            self._show("\n" * self._held + shown)
            self._held = 0
        self._held += len(text) - len(shown)

    def _show(self, text: str) -> None:
        if self._state is _State.REASONING:
            self._emit(ReasoningDelta(text))
        else:
            self._has_content = True
            self._emit(ContentDelta(text))

    def _take_body(self, text: str) -> None:
        was_announced = self._scanner.announced
        arguments = self._scanner.feed(text)
        if not self._scanner.announced:
            self._body += text
            if self._scanner.malformed:
                self._end_call()
            return
        if not was_announced:
            assert self._scanner.name is not None
            self._emit(ToolCallStart(self._num_calls, f"call_{secrets.token_hex(12)}", self._scanner.name))
            self._num_calls += 1
            self._body, self._strip = "", not self._has_content
        if arguments:
            self._emit(ToolCallArguments(self._num_calls - 1, arguments))
        if self._scanner.ended:
            self._state = _State.TAIL
            self._take_tail(self._scanner.rest)

    def _take_tail(self, text: str) -> None:
        text = text.lstrip("} \t\r\n")
        if text:
            self._state = _State.CONTENT
            self._take_prose(text)

    def _end_call(self) -> bool:
        """Close the call at hand, if any; False when it did not stand and became content."""
        if self._state is _State.CALL and not self._scanner.announced:
            self._state = _State.CONTENT
            self._take_prose(self._body)
            return False
        if self._state in (_State.CALL, _State.TAIL):
            self._state = _State.CONTENT
        return True

    def _emit(self, delta: ParsedDelta) -> None:
        """Add `delta`, joined to the one before where they continue one another."""
        match (self._deltas[-1] if self._deltas else None), delta:
            case ReasoningDelta(before), ReasoningDelta(text):
                self._deltas[-1] = ReasoningDelta(before + text)
            case ContentDelta(before), ContentDelta(text):
                self._deltas[-1] = ContentDelta(before + text)
            case ToolCallArguments(index, before), ToolCallArguments(_, text):
                self._deltas[-1] = ToolCallArguments(index, before + text)
            case _:
                self._deltas.append(delta)
