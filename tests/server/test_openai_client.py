"""The official `openai` client against the bundled model on a socket: every endpoint as its users call it."""

import asyncio
import json
import time

import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI

MODEL = "tiny-qwen3-code"
HELLO = [{"role": "user", "content": "Write a function that adds two numbers."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]

X = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}


@pytest.fixture(scope="module")
def client(live_url):
    with OpenAI(base_url=f"{live_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mili"


def test_a_completion_and_its_stream(client):
    fields = {"model": MODEL, "prompt": "def fibonacci(n):\n", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**fields)
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert whole.usage.completion_tokens <= 24
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len(chunks) > 5, "it came in pieces"


def test_several_prompts_with_logprobs_and_echo(client):
    fields = {"model": MODEL, "prompt": ["import os", "class A:"], "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**fields, logprobs=2, echo=True)
    for prompt, choice in zip(fields["prompt"], answer.choices, strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs.token_logprobs[0] is None
        assert max(choice.logprobs.token_logprobs[1:]) <= 0


def test_a_chat_and_its_stream(client):
    fields = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    message = whole.choices[0].message
    assert message.role == "assistant"
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == (message.content or "")
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens


def test_the_stream_helper_of_the_client(client):
    fields = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    with client.chat.completions.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.current_completion_snapshot  # get_final_completion refuses what ended by length
    assert "content.delta" in kinds
    assert final.choices[0].message.content == client.chat.completions.create(**fields).choices[0].message.content


def test_vllms_fields_go_through_extra_body(client):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=6,
        extra_body={
            "top_k": 1,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "return_token_ids": True,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    assert len(answer.choices[0].token_ids) == answer.usage.completion_tokens == 6
    assert answer.prompt_token_ids


def test_a_required_tool_is_called(client):
    fields = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "temperature": 0, "max_tokens": 200}
    fields["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    choice = client.chat.completions.create(**fields, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    named = {"type": "function", "function": {"name": "weather"}}
    chunks = client.chat.completions.create(**fields, tool_choice=named, parallel_tool_calls=False, stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather" and deltas[0].id.startswith("call_")
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments

    answered = [
        *HELLO,
        choice.message,  # as the client got it
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert client.chat.completions.create(model=MODEL, messages=answered, tools=TOOLS, max_tokens=4).choices


class Point(pydantic.BaseModel):
    x: int
    y: bool


def test_structured_output_parses(client):
    fields = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 400}
    fields["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
    point = client.chat.completions.parse(**fields, response_format=Point).choices[0].message.parsed
    assert isinstance(point, Point)
    text = client.chat.completions.create(**fields, response_format={"type": "text"}).choices[0].message.content
    assert text


@pytest.mark.parametrize(
    ("form", "fits"),
    [
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"regex": "[0-9]{3}-[a-f]{2}"}, lambda text: text[3] == "-" and len(text) == 6),
        ({"grammar": 'start: "a" "b"~2..3'}, lambda text: text in ("abb", "abbb")),
        ({"json": X}, lambda text: json.loads(text)["x"] in (1, 2)),
    ],
    ids=["choice", "regex", "grammar", "json"],
)
def test_vllms_structured_outputs(client, form, fits):
    answer = client.completions.create(
        model=MODEL, prompt="Answer:", max_tokens=300, temperature=0, extra_body={"structured_outputs": form}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert fits(answer.choices[0].text)


def test_errors_are_the_clients_exceptions(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"foo": 1})
    assert unknown.value.param == "foo"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as streamed:
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, max_tokens=-1)
    assert streamed.value.param == "max_tokens"


def wait_until_idle(llm, seconds=5.0):
    deadline = time.monotonic() + seconds
    while llm.num_unfinished:
        assert time.monotonic() < deadline, "an aborted request goes on"
        time.sleep(0.01)
    metrics = llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0


def test_leaving_a_stream_frees_its_pages(client, live_llm):
    long = {"model": MODEL, "max_tokens": 1500, "temperature": 0, "extra_body": {"ignore_eos": True}}
    for create, prompt in (
        (client.chat.completions.create, {"messages": HELLO}),
        (client.completions.create, {"prompt": "def f("}),
    ):
        with create(**prompt, **long, stream=True) as stream:
            for _, _ in zip(range(3), stream, strict=False):
                assert live_llm.num_unfinished == 1
        wait_until_idle(live_llm)


def test_leaving_before_the_answer_frees_its_pages(live_url, live_llm):
    async def main():
        async with AsyncOpenAI(base_url=f"{live_url}/v1", api_key="none", max_retries=0) as client:
            long = {"model": MODEL, "messages": HELLO, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
            tasks = [asyncio.create_task(client.chat.completions.create(**long, n=2)) for _ in range(4)]
            while live_llm.num_unfinished < 8:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(asyncio.wait_for(main(), 30))
    wait_until_idle(live_llm)


def test_many_clients_at_once_get_what_each_would_alone(client, live_url):
    def fields(index):
        return {"model": MODEL, "prompt": f"x{index} = ", "max_tokens": 16, "temperature": 0}

    async def main():
        async with AsyncOpenAI(base_url=f"{live_url}/v1", api_key="none", max_retries=0) as client:

            async def streamed(index):
                chunks = await client.completions.create(**fields(index), stream=True)
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*map(streamed, range(24)))

    texts = asyncio.run(asyncio.wait_for(main(), 60))
    assert texts == [client.completions.create(**fields(index)).choices[0].text for index in range(24)]
