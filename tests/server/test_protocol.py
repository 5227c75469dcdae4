"""The bodies by themselves: which fields there are, and what they come to."""

import asyncio
from dataclasses import fields
from typing import Any

import pytest
from pydantic import ValidationError

from mili.errors import RequestError
from mili.sampling_params import SamplingParams
from mili.server.concurrency import gather, merge
from mili.server.errors import ApiError, field_path
from mili.server.protocol import NO_EFFECT, NOT_HONOURED, GenerationFields
from mili.server.protocol_chat import ChatRequest
from mili.server.protocol_completions import CompletionRequest, TokenizeRequest
from mili.structured_outputs import StructuredOutputsParams

HELLO = [{"role": "user", "content": "Hello?"}]
OPENAI = (
    "messages, model, max_tokens, max_completion_tokens, temperature, top_p, n, stop, seed, presence_penalty, "
    "frequency_penalty, logit_bias, logprobs, top_logprobs, response_format, tools, tool_choice, parallel_tool_calls, "
    "stream, stream_options, user, metadata, store, service_tier"
)
VLLM = (
    "top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, include_stop_str_in_output, "
    "skip_special_tokens, prompt_logprobs, structured_outputs, chat_template_kwargs, add_generation_prompt, "
    "continue_final_message, priority, cache_salt, thinking_token_budget, return_token_ids"
)


def chat(**given: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": HELLO, **given})


def test_every_field_of_the_two_apis_is_a_field_or_refused_by_name():
    names = set(f"{OPENAI}, {VLLM}".split(", "))
    assert names <= ChatRequest.model_fields.keys() | NOT_HONOURED.keys()
    assert names & NOT_HONOURED.keys() == {"priority", "cache_salt", "thinking_token_budget"}
    assert not ChatRequest.model_fields.keys() & NOT_HONOURED.keys()
    assert not CompletionRequest.model_fields.keys() & CompletionRequest.refused.keys()


def test_only_four_fields_change_nothing():
    """Every other field of the common base is read somewhere: as a parameter of sampling or by name."""
    sampling = {field.name for field in fields(SamplingParams)}
    by_name = {"model", "stream", "stream_options", "response_format", "return_token_ids"}
    assert GenerationFields.model_fields.keys() - sampling - by_name == set(NO_EFFECT)


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams) if f.name in GenerationFields.model_fields])
def test_every_sampling_field_reaches_sampling_params(name):
    special = {"stop": ["a"], "bad_words": ["b"], "logit_bias": {"5": 1.0}, "stop_token_ids": [3], "top_p": 0.5}
    flags = {"include_stop_str_in_output": True, "ignore_eos": True, "skip_special_tokens": False}
    forms = {"structured_outputs": {"regex": "a"}}
    value: Any = {**special, **flags, **forms}.get(name, 2 if name not in ("min_p", "temperature") else 0.5)
    body = chat(**{name: value})
    params = body.chat_sampling_params(SamplingParams(), body.grammar())
    plain = chat().chat_sampling_params(SamplingParams(), None)
    assert getattr(params, name) != getattr(plain, name)
    assert [f.name for f in fields(params) if getattr(params, f.name) != getattr(plain, f.name)] == [name]


def test_null_means_the_default():
    default = SamplingParams(temperature=0.6, top_k=20, max_tokens=7)
    nulls = {name: None for name in ChatRequest.model_fields if name != "messages"}
    assert chat(**nulls).chat_sampling_params(default, None) == default
    assert chat(max_completion_tokens=9).chat_sampling_params(default, None).max_tokens == 9
    assert chat(logprobs=True).chat_sampling_params(default, None).logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).chat_sampling_params(default, None).logprobs == 4
    assert chat(logprobs=False).chat_sampling_params(default, None).logprobs is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": {"type": "object"}}}},
            {"json": {"type": "object"}},
        ),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, {"json": {"type": "object"}}),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"grammar": "start: A"}}, {"grammar": "start: A"}),
    ],
)
def test_the_two_ways_to_ask_for_a_form(given, expected):
    assert chat(**given).grammar() == (None if expected is None else StructuredOutputsParams(**expected))


def test_a_form_is_asked_for_once():
    with pytest.raises(ApiError, match="give one of the two"):
        chat(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}).grammar()
    with pytest.raises(RequestError, match="exactly one"):
        chat(structured_outputs={}).grammar()


def test_messages_keep_what_templates_read():
    body = ChatRequest.model_validate(
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "reasoning_content": "hm", "refusal": None, "tool_calls": []},
                {"role": "tool", "content": "", "tool_call_id": "7", "name": "f"},
            ]
        }
    )
    assert body.template_messages() == [
        {"role": "system", "content": "a\nb"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "7"},
    ]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_one_or_several(prompt, prompts):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


def test_echo_only_is_a_prompt_and_no_tokens():
    body = CompletionRequest.model_validate({"prompt": "a", "echo": True, "max_tokens": 0, "logprobs": 1})
    params = body.completion_sampling_params(SamplingParams())
    assert (params.max_tokens, params.logprobs, params.prompt_logprobs) == (1, 1, 1)


@pytest.mark.parametrize("name", ["tools", "add_generation_prompt", "chat_template_kwargs", "continue_final_message"])
def test_tokenizing_a_prompt_refuses_what_only_messages_have(name):
    value = {"tools": [], "chat_template_kwargs": {}}.get(name, True)
    with pytest.raises(ApiError, match=f"{name}: only with messages"):
        TokenizeRequest.model_validate({"prompt": "a", name: value}).check()
    TokenizeRequest.model_validate({"messages": HELLO, name: value}).check()


@pytest.mark.parametrize("value", [True, 1.0, "1", [1]])
def test_types_are_exact(value):
    with pytest.raises(ValidationError):
        chat(max_tokens=value)


def test_paths_are_written_as_in_a_program():
    assert field_path(("messages", 0, "content", 2, "text")) == "messages[0].content[2].text"


# --- several at once ---


class Source:
    """A stream of numbers that notes how it ended."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count, self.error, self.closed = count, error, False

    async def stream(self):
        try:
            for number in range(self.count):
                await asyncio.sleep(0)
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def test_merged_streams_are_each_in_order_and_complete():
    async def main():
        sources = [Source(3), Source(0), Source(5)]
        found = [pair async for pair in merge([source.stream() for source in sources])]
        for index, source in enumerate(sources):
            assert [item for i, item in found if i == index] == list(range(source.count))

    asyncio.run(main())


def test_a_failing_stream_closes_the_others():
    async def main():
        sources = [Source(10**6), Source(2, ValueError("no")), Source(10**6)]
        with pytest.raises(ValueError, match="no"):
            async for _ in merge([source.stream() for source in sources]):
                pass
        assert all(source.closed for source in sources)

    asyncio.run(main())


def test_leaving_a_merged_stream_closes_all():
    async def main():
        sources = [Source(10**6), Source(10**6)]
        merged = merge([source.stream() for source in sources])
        for _ in range(5):
            await anext(merged)
        await merged.aclose()
        assert all(source.closed for source in sources)

    asyncio.run(main())


def test_gather_cancels_the_rest_when_one_fails():
    cancelled = []

    async def wait_for_ever(name):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    async def fail():
        await asyncio.sleep(0)
        raise ValueError("no")

    async def main():
        with pytest.raises(ValueError, match="no"):
            await gather([wait_for_ever("a"), fail(), wait_for_ever("b")])
        assert cancelled == ["a", "b"]

    asyncio.run(main())
