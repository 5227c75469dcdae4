"""/v1/chat/completions: messages, reasoning, tools, log-probabilities, and that streams add up to answers."""

from typing import Any

import pytest

from support.api import joined_chat

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, "temperature": 0, **fields}


def both(api, body: dict[str, Any]) -> dict[str, Any]:
    """The answer without streaming; the stream must add up to it."""
    whole = api.post(CHAT, body)
    chunks = api.stream(CHAT, {**body, "stream_options": {"include_usage": True}})
    choices = joined_chat(chunks)
    for choice in [*whole["choices"], *choices.values()]:
        for call in choice["message"].get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
    assert [choices[index] for index in sorted(choices)] == whole["choices"]
    usage = chunks[-1]["usage"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert usage["completion_tokens_details"] == whole["usage"]["completion_tokens_details"]
    assert len({(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    return whole


def test_an_answer_has_openais_shape(make_api, tokenizer):
    api = make_api("Hello there.\n")
    answer = both(api, ask(model="tiny-qwen3-code"))
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny-qwen3-code"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello there.\n", "reasoning": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    prompt = api.llm.render_chat(HELLO).token_ids
    num_new = len(tokenizer.encode("Hello there.\n")) + 1
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": num_new,
        "total_tokens": len(prompt) + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_reasoning_is_apart_from_the_content(make_api, tokenizer):
    answer = both(make_api("<think>\nLet me see.\n</think>\n\nYes."), ask())
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Yes.", "reasoning": "Let me see."}
    num_reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 0 < num_reasoning < answer["usage"]["completion_tokens"]


def test_reasoning_has_its_other_name_when_configured(make_api):
    api = make_api("<think>\nLet me see.\n</think>\n\nYes.", reasoning_content=True)
    message = both(api, ask())["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "Let me see."


def test_tools_are_called_and_finish_the_answer(make_api):
    answer = both(make_api(f"I look.\n{CALL}\n{CALL}"), ask(tools=[WEATHER]))
    function = {"name": "weather", "arguments": '{"city": "Zürich"}'}
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "I look.",
        "reasoning": None,
        "tool_calls": [{"type": "function", "function": function}] * 2,
    }
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_cut_short_ends_by_length(make_api, tokenizer):
    num_tokens = len(tokenizer.encode(CALL)) - 8
    choice = both(make_api(CALL), ask(tools=[WEATHER], max_tokens=num_tokens))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_tools_that_must_not_be_called_are_not_shown_to_the_model(api):
    shown = api.post(CHAT, ask(tools=[WEATHER], max_tokens=1))["usage"]["prompt_tokens"]
    hidden = api.post(CHAT, ask(tools=[WEATHER], tool_choice="none", max_tokens=1))["usage"]["prompt_tokens"]
    assert hidden == api.post(CHAT, ask(max_tokens=1))["usage"]["prompt_tokens"] < shown


def test_without_tools_a_call_is_text(make_api):
    assert make_api(CALL).post(CHAT, ask())["choices"][0]["message"]["content"] == CALL


def test_several_answers_stream_at_once(api):
    body = ask(n=3, temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    answer = both(api, body)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1
    assert answer["usage"]["completion_tokens"] == 27


def test_logprobs_have_bytes_and_the_most_likely_tokens(api, tokenizer):
    body = ask(logprobs=True, top_logprobs=3, max_tokens=12, temperature=1.0, seed=1, ignore_eos=True)
    answer = both(api, {**body, "return_token_ids": True})
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [tokenizer.token_text(i) for i in choice["token_ids"]]
    for entry in content:
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        top = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry["logprob"] <= top[0]
    alone = both(api, ask(logprobs=True, max_tokens=2, ignore_eos=True))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in alone] == [[], []]


def test_token_ids_and_prompt_logprobs(api):
    body = ask(max_tokens=3, prompt_logprobs=1, return_token_ids=True, ignore_eos=True)
    answer = api.post(CHAT, body)
    prompt = api.llm.render_chat(HELLO).token_ids
    assert answer["prompt_token_ids"] == prompt
    assert answer["prompt_logprobs"][0] is None
    for token_id, entry in zip(prompt[1:], answer["prompt_logprobs"][1:], strict=True):
        assert entry[str(token_id)].keys() == {"logprob", "rank", "decoded_token"}
    chunks = api.stream(CHAT, ask(max_tokens=3, return_token_ids=True, ignore_eos=True))
    assert chunks[0]["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
    assert joined_chat(chunks)[0]["token_ids"] == answer["choices"][0]["token_ids"]


def test_a_stop_string_ends_the_answer_and_is_its_reason(make_api):
    choice = both(make_api("alpha beta gamma"), ask(stop="a g"))["choices"][0]
    assert choice["message"]["content"] == "alpha bet"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "a g")


def test_max_completion_tokens_limits_the_answer(api):
    answer = api.post(CHAT, ask(max_completion_tokens=4, ignore_eos=True))
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("body", [{}, {"max_tokens": None}])
def test_without_a_limit_the_context_is_the_end(make_api, body):
    api = make_api(llm={"max_model_len": 64})
    answer = api.post(CHAT, ask(ignore_eos=True, **body))
    assert answer["usage"]["total_tokens"] == 64


def test_a_conversation_reaches_the_model_as_the_template_writes_it(make_api):
    api = make_api("ok")
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Weather?", "name": "Ada"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "reasoning": "Look.",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"x":1}'}}],
        },
        {"role": "tool", "content": "Rain", "tool_call_id": "1"},
    ]
    answer = api.post(CHAT, ask(messages=messages, return_token_ids=True, max_tokens=1))
    text = api.llm.get_tokenizer().decode(answer["prompt_token_ids"])
    assert "<|im_start|>system\nBe\nbrief.<|im_end|>" in text
    assert "<think>\nLook.\n</think>" in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"x": 1}}\n</tool_call>' in text
    assert "<tool_response>\nRain\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_the_template_is_told_whether_to_think_and_where_to_go_on(api):
    def prompt(**fields: Any) -> str:
        answer = api.post(CHAT, ask(return_token_ids=True, max_tokens=1, **fields))
        return api.llm.get_tokenizer().decode(answer["prompt_token_ids"])

    assert prompt(chat_template_kwargs={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert prompt(add_generation_prompt=False).endswith("Hello?<|im_end|>\n")
    begun = [*HELLO, {"role": "assistant", "content": "Well, I"}]
    assert prompt(messages=begun, add_generation_prompt=False, continue_final_message=True).endswith("Well, I")


def test_fields_without_effect_have_none(make_api):
    api = make_api("ok")
    without = api.post(CHAT, ask())
    with_them = api.post(CHAT, ask(metadata={"a": "b"}, store=True, service_tier="flex", user="ada"))
    assert with_them["choices"] == without["choices"]


def test_a_cached_prompt_is_counted(api):
    long = [{"role": "user", "content": "one two three " * 20}]
    first = api.post(CHAT, ask(messages=long, max_tokens=1))["usage"]
    second = api.post(CHAT, ask(messages=long, max_tokens=1))["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] > 0


def test_every_request_is_observed_to_its_end(api):
    api.post(CHAT, ask(max_tokens=2))
    api.stream(CHAT, ask(max_tokens=2))
    kinds = [event[0] for event in api.recorder.events]
    assert kinds == ["started", "first_token", "finished"] * 2
