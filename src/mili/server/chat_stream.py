"""The chunks of a streamed chat answer.

Runs for every token of every stream, so a chunk is a fixed beginning, the new text as JSON, and a fixed end; dicts are
built only for what is rare. Knows no HTTP. Invariant: chunks depend on what is new since the last output, however many
tokens came at once.
"""

import time
from collections.abc import Sequence

from mili.output_parser import (
    ContentDelta,
    OutputParser,
    ParsedDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from mili.outputs import CompletionOutput, FinishReason, RequestOutput
from mili.server.json_text import json_text
from mili.server.logprobs import chat_logprobs
from mili.server.routing import usage_of
from mili.tokenizer import Tokenizer

_FIRST = '{"role":"assistant","content":""}'


def chat_finish_reason(completion: CompletionOutput, called_tools: bool) -> str:
    """Why an answer ended; one that ended by itself after calling tools did so for their results."""
    assert completion.finish_reason is not None
    return "tool_calls" if called_tools and completion.finish_reason is FinishReason.STOP else completion.finish_reason


class _Choice:
    """How far one of the answers has come."""

    def __init__(self, parser: OutputParser) -> None:
        self.parser = parser
        self.num_tokens = 0
        self.num_told = 0  # of those, the tokens whose ids and log-probabilities were sent
        self.called_tools = False
        self.finished = False


class ChatStreamWriter:
    """Writes one request's outputs as events."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        parsers: Sequence[OutputParser],
        *,
        request_id: str,
        model: str,
        num_top_logprobs: int | None,
        reasoning_content: bool,
        token_ids: bool,
        usage: bool,
    ) -> None:
        """`parsers` has one for each answer; the flags say what to send besides the message."""
        self._tokenizer = tokenizer
        self._choices = [_Choice(parser) for parser in parsers]
        self._num_top_logprobs = num_top_logprobs
        self._reasoning_content = reasoning_content
        self._token_ids = token_ids
        self._begun = False
        same = {"id": request_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._head = f"data: {json_text(same)[:-1]},"
        self._end = ',"usage":null}\n\n' if usage else "}\n\n"

    def write(self, output: RequestOutput) -> bytes:
        """What is new in `output`, as events; perhaps nothing."""
        events = []
        if not self._begun:
            self._begun = True
            prompt = f',"prompt_token_ids":{json_text(output.prompt_token_ids)}' if self._token_ids else ""
            for index in range(len(self._choices)):
                events.append(self._event(index, _FIRST, prompt=prompt))
        for completion, choice in zip(output.outputs, self._choices, strict=True):
            finished = completion.finish_reason is not None
            if choice.finished or not (finished or len(completion.token_ids) > choice.num_tokens):
                continue
            new_ids = completion.token_ids[choice.num_tokens :]
            choice.num_tokens += len(new_ids)
            for delta in choice.parser.feed(new_ids, len(completion.text), finished):
                events.append(self._event(completion.index, self._delta(delta), more=self._untold(completion, choice)))
                choice.called_tools |= type(delta) is ToolCallStart
            if finished:
                choice.finished = True
                reason = f'"{chat_finish_reason(completion, choice.called_tools)}"'
                more = f',"stop_reason":{json_text(completion.stop_reason)}{self._untold(completion, choice)}'
                events.append(self._event(completion.index, "{}", reason, more=more))
        return "".join(events).encode()

    def write_usage(self, output: RequestOutput) -> bytes:
        """The chunk without choices that ends a stream with usage."""
        reasoning_tokens = sum(choice.parser.num_reasoning_tokens for choice in self._choices)
        usage = json_text(usage_of([output], reasoning_tokens=reasoning_tokens))
        return f'{self._head}"choices":[],"usage":{usage}}}\n\n'.encode()

    def _event(self, index: int, delta: str, finish_reason: str = "null", *, more: str = "", prompt: str = "") -> str:
        return (
            f'{self._head}"choices":[{{"index":{index},"delta":{delta},"finish_reason":{finish_reason}{more}}}]'
            f"{prompt}{self._end}"
        )

    def _delta(self, delta: ParsedDelta) -> str:
        match delta:
            case ContentDelta(text):
                return f'{{"content":{json_text(text)}}}'
            case ReasoningDelta(text):
                also = f',"reasoning_content":{json_text(text)}' if self._reasoning_content else ""
                return f'{{"reasoning":{json_text(text)}{also}}}'
            case ToolCallStart(index, call_id, name):
                call = f'"index":{index},"id":"{call_id}","type":"function"'
                return f'{{"tool_calls":[{{{call},"function":{{"name":{json_text(name)},"arguments":""}}}}]}}'
            case ToolCallArguments(index, text):
                return f'{{"tool_calls":[{{"index":{index},"function":{{"arguments":{json_text(text)}}}}}]}}'

    def _untold(self, completion: CompletionOutput, choice: _Choice) -> str:
        """Ids and log-probabilities of the tokens since the last event, text that is held back included."""
        if self._num_top_logprobs is None and not self._token_ids:
            return ',"logprobs":null'
        new = slice(choice.num_told, choice.num_tokens)
        choice.num_told = choice.num_tokens
        logprobs = None
        if completion.logprobs is not None and self._num_top_logprobs is not None:
            logprobs = chat_logprobs(completion.logprobs[new], self._num_top_logprobs, self._tokenizer)
        ids = f',"token_ids":{json_text(completion.token_ids[new])}' if self._token_ids else ""
        return f',"logprobs":{json_text(logprobs)}{ids}'
