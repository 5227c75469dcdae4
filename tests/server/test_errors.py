"""Every refusal has a status, a type, the field's name, and nothing a client should not see."""

import asyncio
import json
import time
from typing import Any

import pytest

from mili.sampling_params import SamplingParams
from support.api import events_of

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello?"}]
NESTED: dict[str, Any] = json.loads('{"items":' * 200 + "{}" + "}" * 200)
ALIEN = {"type": "object", "properties": {"a": {"type": "alien"}}}
STRICT_ALIEN = {"type": "function", "function": {"name": "f", "parameters": ALIEN, "strict": True}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "x", **fields}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(foo=1), "foo"),
        (COMPLETIONS, completion(foo=None), "foo"),
        (CHAT, chat(guided_json={}), "guided_json"),
        (CHAT, chat(priority=1), "priority"),
        (CHAT, chat(cache_salt="x"), "cache_salt"),
        (CHAT, chat(thinking_token_budget=5), "thinking_token_budget"),
        (CHAT, chat(echo=True), "echo"),
        (COMPLETIONS, completion(best_of=2), "best_of"),
        (COMPLETIONS, completion(suffix="}"), "suffix"),
        (CHAT, chat(temperature=-1), "temperature"),
        (CHAT, chat(temperature="1"), "temperature"),
        (CHAT, chat(temperature=10**400), "temperature"),
        (CHAT, chat(max_tokens=0), "max_tokens"),
        (CHAT, chat(max_tokens=5.0), "max_tokens"),
        (CHAT, chat(max_tokens=5, max_completion_tokens=6), "max_completion_tokens"),
        (CHAT, chat(top_p=0), "top_p"),
        (CHAT, chat(n=129), "n"),
        (CHAT, chat(n=True), "n"),
        (CHAT, chat(n=2, temperature=0), "n"),
        (CHAT, chat(seed=2**70), "seed"),
        (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
        (CHAT, chat(max_completion_tokens=0), "max_completion_tokens"),
        (CHAT, chat(top_logprobs=2), "top_logprobs"),
        (CHAT, chat(stop=[1]), "stop"),
        (CHAT, chat(stop=["a"] * 10_000), "stop"),
        (CHAT, chat(stop="a" * 20_000), "stop"),
        (CHAT, chat(stop_token_ids=["a"]), "stop_token_ids"),
        (CHAT, chat(logit_bias={"a": 1}), "logit_bias"),
        (CHAT, chat(logit_bias={"99999999": 1}), "logit_bias"),
        (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
        (CHAT, chat(stream=True, stream_options={"foo": 1}), "stream_options.foo"),
        (CHAT, chat(stream=True, prompt_logprobs=1), "prompt_logprobs"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "foo": 1}]}, "messages[0].foo"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [*HELLO, {"role": "user", "content": [{"type": "image_url"}]}]}, "messages[1].content"),
        (CHAT, {"messages": [*HELLO, {"role": "user", "audio": {"id": "1"}}]}, "messages[1].audio"),
        (
            CHAT,
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
        ),
        (CHAT, chat(tools=[{"type": "web"}]), "tools[0].type"),
        (CHAT, chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
        (CHAT, chat(tools=[TOOL], tool_choice="any"), "tool_choice"),
        (CHAT, chat(tool_choice="required"), "tool_choice"),
        (
            CHAT,
            chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
            "tool_choice.function.name",
        ),
        (CHAT, chat(tools=[TOOL], response_format={"type": "json_object"}), "tool_choice"),
        (CHAT, chat(response_format={"type": "xml"}), "response_format.type"),
        (CHAT, chat(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (CHAT, chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs"),
        (CHAT, chat(structured_outputs={"json": "{"}), "structured_outputs.json"),
        (
            CHAT,
            chat(response_format=schema_format(NESTED)),
            "response_format",
        ),
        (CHAT, chat(structured_outputs={"structural_tag": "a"}), "structured_outputs.structural_tag"),
        (CHAT, chat(structured_outputs={"regex": "("}), "structured_outputs.regex"),
        (COMPLETIONS, completion(structured_outputs={"grammar": "nonsense"}), "structured_outputs.grammar"),
        (CHAT, chat(response_format=schema_format({"type": "alien"})), "response_format"),
        (CHAT, chat(tools=[STRICT_ALIEN]), "tools"),
        (CHAT, chat(chat_template="{{ 1 }}"), "chat_template"),
        (CHAT, chat(continue_final_message=True), "continue_final_message"),
        (CHAT, chat(chat_template_kwargs=[]), "chat_template_kwargs"),
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [[]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
        (COMPLETIONS, {"prompt": {"prompt": "x"}}, "prompt"),
        (COMPLETIONS, {"prompt": [["a"]]}, "prompt"),
        (COMPLETIONS, {"prompt": ["x"] * 400}, "prompt"),
        (COMPLETIONS, completion(logprobs=True), "logprobs"),
        (COMPLETIONS, completion(max_tokens=0), "max_tokens"),
        ("/generate", {"prompt": "x", "model": "y"}, "model"),
        ("/generate", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x", "tools": []}, "tools"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ],
)
def test_a_bad_field_is_named(api, path, body, param):
    error = api.error(path, body)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1].split("[")[0] in error["message"]
    assert api.recorder.events == [], "nothing of it was begun"


@pytest.mark.parametrize(
    "field",
    [
        {"priority": 0},
        {"best_of": 1},
        {"suffix": None},
        {"cache_salt": None},
        {"use_beam_search": False},
        {"logprobs": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"functions": None},
        {"stop": None},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_that_says_off_is_as_good_as_none(api, field):
    assert api.post(CHAT, chat(max_tokens=1, **field))["choices"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate"])
def test_a_long_prompt_is_told_both_numbers(make_api, path):
    api = make_api(llm={"max_model_len": 32})
    text = "one two three " * 40
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    error = api.error(path, body)
    assert error["code"] == "context_length_exceeded"
    assert f"{api.post('/tokenize', body)['count']} tokens" in error["message"]
    assert " 32 " in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_an_unknown_model_is_not_found(api, path):
    body = {CHAT: chat(), COMPLETIONS: completion(), "/tokenize": completion(), "/detokenize": {"tokens": [1]}}[path]
    error = api.error(path, {**body, "model": "gpt-5\ud800"}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert api.request("GET", "/v1/models/gpt-5").status_code == 404


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "parsing"),
        (b"[" * 100_000, "parsing"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "parsing"),
    ],
)
def test_a_body_that_cannot_be_read_is_a_400(api, content, text):
    answer = api.request("POST", COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "\\ud800"}',
        '{"prompt": "x", "stop": "\\ud800", "max_tokens": 1}',
        '{"prompt":"x","temperature":NaN}',
    ],
)
def test_what_json_allows_and_text_does_not(api, text):
    answer = api.request("POST", COMPLETIONS, content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    assert answer.json()


@pytest.mark.parametrize(
    "body",
    [
        {f"field{i}": 0 for i in range(100_000)},
        {"messages": [0] * 200_000},
        {"messages": HELLO, "tools": [0] * 200_000},
        {"messages": HELLO, "stop": [0] * 200_000},
        {"messages": HELLO, "structured_outputs": {"choice": [0] * 200_000}},
        {"messages": HELLO, "logit_bias": {str(i): "x" for i in range(100_000)}},
        {"messages": [{"role": "user", "content": [0] * 200_000}]},
    ],
    ids=["fields", "messages", "tools", "stop", "choice", "bias", "parts"],
)
def test_a_body_that_is_wrong_a_million_times_is_refused_for_the_first(api, body):
    error = api.error(CHAT, body)
    assert len(error["message"]) < 1000


def test_no_such_path_and_no_such_method(api):
    assert api.error("/v1/nothing", {}, 404)["code"] == "not_found"
    answer = api.request("GET", CHAT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


# --- the engine's own troubles ---


def test_a_full_queue_is_a_429_that_says_when_to_come_back(make_api):
    api = make_api(llm={"max_num_seqs": 1, "max_queue": 0}, max_queue=0)

    async def crowd():
        body = completion(max_tokens=60, ignore_eos=True)
        return await asyncio.gather(*(api._client.post(COMPLETIONS, json=body) for _ in range(8)))

    answers = api.loop.run(crowd())
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in refused:
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
    events = [event[0] for event in api.recorder.events]
    assert events.count("started") == 8
    assert events.count("rejected") == len(refused)
    assert events.count("finished") == 8 - len(refused)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_gone_is_a_503(api, stream):
    api.llm.close()
    error = api.error(COMPLETIONS, completion(stream=stream), 503)
    assert (error["type"], error["code"]) == ("service_unavailable", "engine_dead")
    assert api.recorder.events[-1][0::2] == ("aborted", "engine_dead")


@pytest.mark.parametrize("stream", [False, True])
def test_a_step_that_fails_takes_its_requests_with_it_and_says_no_more(make_api, stream):
    api = make_api()
    api.fake.fail_at = {1}
    answer = api.request("POST", COMPLETIONS, json=completion(stream=stream, max_tokens=3))
    assert answer.status_code == 500
    assert "fire" not in answer.text
    assert answer.json()["error"]["type"] == "internal_server_error"
    assert api.recorder.events[-1][0::2] == ("aborted", "error")
    assert api.post(COMPLETIONS, completion(max_tokens=3))["choices"], "the next one is served"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate"])
def test_what_fails_in_a_stream_is_an_event_and_no_done(make_api, path):
    api = make_api()
    api.fake.fail_at = {4}
    body = {**(chat() if path == CHAT else completion()), "max_tokens": 9, "stream": True}
    answer = api.request("POST", path, json=body if path == "/generate" else {**body, "ignore_eos": True})
    assert answer.status_code == 200
    *chunks, last = events_of(answer.text)
    assert chunks
    assert last["error"]["type"] == "internal_server_error"
    assert "fire" not in json.dumps(last)


# --- clients that leave ---


async def call_and_leave(app: Any, path: str, body: dict[str, Any], after: int) -> list[dict[str, Any]]:
    """Send a request, and disconnect when `after` messages of the answer have come."""
    sent: list[dict[str, Any]] = []
    enough = asyncio.Event()
    content = json.dumps(body).encode()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": content, "more_body": False}
        if after:
            await enough.wait()
        else:
            await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) == after:
            enough.set()

    headers = [
        (b"x-request-id", b"mine"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await asyncio.wait_for(app(scope, receive, send), 20)
    return sent


@pytest.mark.parametrize(
    ("path", "fields", "after"),
    [
        (CHAT, {"stream": True}, 3),
        (CHAT, {"stream": True, "n": 3}, 2),
        (CHAT, {}, 0),
        (COMPLETIONS, {"stream": True}, 3),
        (COMPLETIONS, {"stream": True, "prompt": ["x", "y", "z"]}, 3),
        (COMPLETIONS, {"prompt": ["x", "y"]}, 0),
    ],
)
def test_a_client_that_leaves_takes_its_request_with_it(make_api, path, fields, after):
    api = make_api()
    plain = api.fake.submit
    api.fake.submit = lambda *args, **options: (time.sleep(0.005), plain(*args, **options))[1]
    body = {**(chat() if path == CHAT else completion()), "ignore_eos": True, **fields}

    async def main() -> list[dict[str, Any]]:
        sent = await call_and_leave(api.app, path, body, after)
        steps = api.fake.num_steps
        await asyncio.wait_for(api.llm.wait_idle(), 5)
        assert api.fake.num_steps <= steps + 2, "it went on after its client had left"
        await api.llm.reset_prefix_cache()
        assert api.llm.get_metrics()["kv_cache_usage_perc"] == 0
        return sent

    sent = api.loop.run(main())
    statuses = [message["status"] for message in sent if message["type"] == "http.response.start"]
    assert statuses == [200 if after else 499]
    started = [event for event in api.recorder.events if event[0] == "started"]
    assert len(started) == len(body["prompt"] if isinstance(body.get("prompt"), list) else "1")
    assert started[0][1].startswith("mine")
    assert [event[2] for event in api.recorder.events if event[0] == "aborted"] == ["disconnect"] * len(started)


def test_two_requests_may_have_one_id(make_api):
    api = make_api()
    body = completion(max_tokens=30, ignore_eos=True, stream=True)

    async def main() -> None:
        await asyncio.gather(*(call_and_leave(api.app, COMPLETIONS, body, 10**6) for _ in range(2)))

    api.loop.run(main())
    first, second = (event[1] for event in api.recorder.events if event[0] == "started")
    assert first == "mine" and second.startswith("mine-")
    assert [event[0] for event in api.recorder.events].count("finished") == 2


def test_defaults_are_valid_params(api):
    assert api.llm.get_default_sampling_params() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)


def test_a_message_shows_the_value_and_the_limit(api):
    assert api.error(CHAT, chat(n=500))["message"] == "n: Input should be less than or equal to 128, got 500"
    assert '"' + "x" * 99 in api.error(CHAT, chat(n="x" * 10_000))["message"]
    assert len(api.error(CHAT, chat(n="x" * 10_000))["message"]) < 300
