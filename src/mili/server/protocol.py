"""Request bodies: what all of them share, and the fields that say how to generate.

    Body ── GenerationFields ── ChatRequest, CompletionRequest      (protocol_chat.py, protocol_completions.py)
         └─ messages, tools, TokenizeRequest, ...

Field names are OpenAI's, and vLLM's where OpenAI has none. Knows no route and no model. Invariant: a field is honoured,
refused by name, or in `NO_EFFECT`; and a body costs time in proportion to its size, however it is wrong.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from mili.sampling_params import SamplingParams
from mili.server.errors import ApiError
from mili.structured_outputs import StructuredOutputsParams

NO_EFFECT = ("metadata", "store", "service_tier", "user")
"""Fields of OpenAI's API without a meaning on one's own machine: accepted, and the only ones that change nothing."""

NOT_HONOURED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "documents": (),
    "echo": (False,),
    "function_call": (),
    "functions": (),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields that mili does not honour, with the values besides null that mean "off"; any other value is a 400."""

MAX_N = 128
MAX_ITEMS = 1024  # stop strings, stop ids, biases, ...: what costs the engine something for every one
MAX_STOP_CHARS = 16_384


class Body(BaseModel):
    """A JSON object without unknown fields, whose values have exactly the types stated."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=False)
    refused: ClassVar[Mapping[str, tuple[object, ...]]] = {}  # fields to name when they say something, as NOT_HONOURED

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        """Report one unknown field; pydantic would make an error object for each of a million."""
        if not isinstance(data, dict):
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in data:
            if name in known:
                continue
            if name not in cls.refused:
                raise PydanticCustomError("unknown_field", "there is no such field", {"field": name})
            if data[name] is not None and data[name] not in cls.refused[name]:
                raise PydanticCustomError("refused_field", "mili does not support this: leave it out", {"field": name})
        return {name: data[name] for name in data if name in known}


def _stop(value: object) -> object:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_ITEMS or sum(map(len, strings)) > MAX_STOP_CHARS:
        raise ValueError(f"at most {MAX_ITEMS} strings with {MAX_STOP_CHARS} characters in all, got {len(strings)}")
    return strings


def _token_ids(value: object) -> object:
    if value is None or (isinstance(value, list) and all(type(item) is int for item in value)):
        if value is not None and len(value) > MAX_ITEMS:
            raise ValueError(f"at most {MAX_ITEMS} token ids, got {len(value)}")
        return value
    raise ValueError("must be a list of token ids")


def _logit_bias(value: object) -> object:
    if value is None or isinstance(value, dict):
        if value is not None and len(value) > MAX_ITEMS:
            raise ValueError(f"at most {MAX_ITEMS} token ids, got {len(value)}")
        return value
    raise ValueError("must be an object of token ids and numbers")


def _schema(value: object) -> object:
    if value is None or isinstance(value, dict | str):
        return value
    raise ValueError("must be a JSON schema: an object, or a string that holds one")


class StreamOptions(Body):
    """What a stream tells besides tokens."""

    refused: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool | None = None


class JsonSchemaFormat(Body):
    """OpenAI's wrapping of a JSON schema; it is always enforced, whatever `strict` says."""

    name: str
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for structured output."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            problem = "is required with" if self.json_schema is None else "may only be given with"
            raise PydanticCustomError(
                "json_schema", "{problem} type json_schema", {"field": "json_schema", "problem": problem}
            )
        return self

    def to_params(self) -> StructuredOutputsParams | None:
        """The grammar, None for plain text."""
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.json_schema)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's way to ask for it; exactly one field."""

    json_schema: Annotated[
        dict[str, Any] | str | None, PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str | None)
    ] = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, fail_fast=True)
    grammar: str | None = None

    def to_params(self) -> StructuredOutputsParams:
        """The grammar. Raises RequestError unless exactly one is given."""
        return StructuredOutputsParams(**self.model_dump(by_alias=True, exclude_none=True))


class GenerationFields(Body):
    """How to generate; the ranges are checked by `SamplingParams`."""

    refused: ClassVar = NOT_HONOURED

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, le=MAX_N)
    stop: Annotated[str | list[str] | None, PlainValidator(_stop, json_schema_input_type=str | list[str] | None)] = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        dict[str, float] | None, PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None)
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    user: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int] | None, PlainValidator(_token_ids, json_schema_input_type=list[int] | None)] = (
        None
    )
    include_stop_str_in_output: bool | None = None
    bad_words: Annotated[list[str] | None, PlainValidator(_stop, json_schema_input_type=list[str] | None)] = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputs | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def check_stream(self) -> None:
        """Raise what contradicts `stream`."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream: true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise ApiError(400, "prompt_logprobs: not with stream: true", param="prompt_logprobs")

    @property
    def grammar_field(self) -> str | None:
        """The field that asks for a grammar."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return None if self.response_format is None or self.response_format.type == "text" else "response_format"

    def grammar(self) -> StructuredOutputsParams | None:
        """The grammar asked for, by whichever field."""
        by_format = None if self.response_format is None else self.response_format.to_params()
        if self.structured_outputs is None:
            return by_format
        if by_format is not None:
            message = "structured_outputs: response_format asks for a grammar already, give one of the two"
            raise ApiError(400, message, param="structured_outputs")
        return self.structured_outputs.to_params()

    def sampling_params(self, default: SamplingParams, **fields: Any) -> SamplingParams:
        """`default`, with what the body gives in its place, and `fields` in place of both."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        return replace(default, **(given | fields))


_SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "logit_bias",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "include_stop_str_in_output",
    "bad_words", "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip
