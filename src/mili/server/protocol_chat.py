"""The body of /v1/chat/completions: messages, tools and the fields only chat has.

Knows how OpenAI clients write conversations and how chat templates read them. Invariant: what `template_messages`
returns is plain JSON in the form Qwen's templates expect: contents are strings, a tool call's arguments an object.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator

from mili.errors import RequestError
from mili.sampling_params import MAX_LOGPROBS, SamplingParams
from mili.server.errors import ApiError
from mili.server.protocol import Body, GenerationFields
from mili.structured_outputs import StructuredOutputsParams


class TextPart(Body):
    """One piece of a message's content; other kinds than text are refused by name."""

    type: Literal["text"]
    text: str


def _content(value: object) -> str | None:
    """The text of a message; parts are joined by newlines, as vLLM joins them."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            problem = "must be an object with a type" if kind is None else f"{kind} is not supported by a text model"
            raise ValueError(f"part {index}: {problem}: send parts of type text")
        if not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(f"part {index}: must be {{'type': 'text', 'text': ...}}")
        texts.append(part["text"])
    return "\n".join(texts)


Content = Annotated[str | None, PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None)]


class FunctionCall(Body):
    """A call the model made in an earlier turn."""

    name: str
    arguments: str


class ToolCall(Body):
    """The same, with the id its result refers to."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    """One message; clients send back the assistant's as they got it."""

    refused: ClassVar = {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, fail_fast=True)
    tool_call_id: str | None = None

    def for_template(self, where: str) -> dict[str, Any]:
        """The message as templates read it. Raises RequestError naming `where` if a call's arguments are no object."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        message["content"] = self.content if self.content is not None else ""
        reasoning = self.reasoning if self.reasoning is not None else self.reasoning_content
        optional = {"name": self.name, "reasoning_content": reasoning, "tool_call_id": self.tool_call_id}
        message |= {name: value for name, value in optional.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, f"{where}.tool_calls[{index}]"),
                    },
                }
                for index, call in enumerate(self.tool_calls)
            ]
        return message


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments must be a JSON object, written as a string")
    return arguments


class Function(Body):
    """A function the model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The function of a named tool choice."""

    name: str


class NamedTool(Body):
    """The tool the model has to call."""

    type: Literal["function"]
    function: NamedFunction


ToolChoiceForms: Any = Literal["none", "auto", "required"] | NamedTool | None


def _as_it_is(value: Any) -> Any:
    """Leave it to `mili.tool_calls`, whose messages are better than those of a union."""
    return value


class ChatRequest(GenerationFields):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(fail_fast=True, min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, fail_fast=True)
    tool_choice: Annotated[Any, PlainValidator(_as_it_is, json_schema_input_type=ToolChoiceForms)] = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def template_messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates read it."""
        return [message.for_template(f"messages[{index}]") for index, message in enumerate(self.messages)]

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        """The tools as plain JSON."""
        return None if not self.tools else [tool.model_dump(exclude_none=True) for tool in self.tools]

    def check_chat(self) -> None:
        """Raise what contradicts itself."""
        self.check_stream()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_completion_tokens: max_tokens is its old name, give one of the two"
            raise ApiError(400, message, param="max_completion_tokens")

    def chat_sampling_params(
        self, default: SamplingParams, structured_outputs: StructuredOutputsParams | None
    ) -> SamplingParams:
        """The sampling parameters, under the grammar that response format and tools come to."""
        fields: dict[str, Any] = {"structured_outputs": structured_outputs}
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        return self.sampling_params(default, **fields)
