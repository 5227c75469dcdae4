"""The bodies of /v1/completions, /generate, /tokenize and /detokenize.

Knows the forms a prompt may have; knows no tokenizer. Invariant: a prompt that passes is text, token ids, or a list of
one kind of them, and never ambiguous: a list of integers is always one prompt.
"""

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from mili.sampling_params import SamplingParams
from mili.server.errors import ApiError
from mili.server.protocol import NOT_HONOURED, Body, GenerationFields
from mili.server.protocol_chat import Message, Tool

PromptForms = str | list[str] | list[int] | list[list[int]]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _prompt(value: object) -> object:
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and value and (all(isinstance(i, str) for i in value) or all(map(_is_ids, value))):
        return value
    raise ValueError("must be a string, a list of token ids, or a list of strings or of lists of token ids; not empty")


class CompletionRequest(GenerationFields):
    """The body of POST /v1/completions."""

    refused: ClassVar = {name: off for name, off in NOT_HONOURED.items() if name != "echo"}

    prompt: Annotated[PromptForms, PlainValidator(_prompt, json_schema_input_type=PromptForms)]
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One prompt or several as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def echo_only(self) -> bool:
        """Whether only the prompt is wanted, as evaluation harnesses ask for to score texts."""
        return bool(self.echo) and self.max_tokens == 0

    def check_completion(self) -> None:
        """Raise what contradicts itself."""
        self.check_stream()
        if self.echo_only and (self.n or 1) > 1:
            raise ApiError(400, "n: must be 1 when max_tokens is 0, there is nothing to draw", param="n")

    def completion_sampling_params(self, default: SamplingParams) -> SamplingParams:
        """The sampling parameters; echoed prompts need the log-probabilities of their tokens too."""
        fields: dict[str, Any] = {"structured_outputs": self.grammar(), "logprobs": self.logprobs}
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            fields["prompt_logprobs"] = self.logprobs
        if self.echo_only:
            fields |= {"max_tokens": 1, "min_tokens": 0}  # the engine makes one token, which is not shown
        return self.sampling_params(default, **fields)


class GenerateRequest(Body):
    """The body of POST /generate."""

    prompt: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None


class TokenizeRequest(Body):
    """The body of POST /tokenize: a prompt, or messages and what renders them."""

    refused: ClassVar = {"chat_template": (), "mm_processor_kwargs": ()}

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, fail_fast=True, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = Field(None, fail_fast=True)
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise unless there is exactly one of prompt and messages, with only the fields that go with it."""
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "prompt: give either a prompt or messages", param="prompt")
        of_chat = ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs")
        for name in of_chat if self.prompt is not None else ("add_special_tokens",):
            if getattr(self, name) not in (None, False):
                partner = "messages" if self.prompt is not None else "a prompt"
                raise ApiError(400, f"{name}: only with {partner}", param=name)


def _all_token_ids(value: object) -> object:
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise ValueError("must be a list of token ids")


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_all_token_ids, json_schema_input_type=list[int])]
