"""/v1/completions, /generate, /tokenize, /detokenize and /v1/models."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mili
from support.api import joined_completions

COMPLETIONS = "/v1/completions"


def ask(prompt: Any = "def f(x):", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, **fields}


def both(api, body: dict[str, Any]) -> dict[str, Any]:
    """The answer without streaming; the stream must add up to it."""
    whole = api.post(COMPLETIONS, body)
    chunks = api.stream(COMPLETIONS, {**body, "stream_options": {"include_usage": True}})
    choices = joined_completions(chunks)
    assert [choices[index] for index in sorted(choices)] == whole["choices"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    return whole


def test_an_answer_has_openais_shape(make_api, tokenizer):
    api = make_api(" return x")
    answer = both(api, ask(model="tiny-qwen3-code"))
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": " return x", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    num_prompt, num_new = len(tokenizer.encode("def f(x):")), len(tokenizer.encode(" return x")) + 1
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


@pytest.mark.parametrize("form", ["ids", "texts", "lists of ids"])
def test_every_form_of_prompt_is_the_same_prompt(api, tokenizer, form):
    text = "for i in range("
    ids = tokenizer.encode(text)
    prompt = {"ids": ids, "texts": [text, text], "lists of ids": [ids, ids]}[form]
    expected = api.post(COMPLETIONS, ask(text, max_tokens=8, ignore_eos=True))["choices"][0]["text"]
    answer = both(api, ask(prompt, max_tokens=8, ignore_eos=True))
    assert {choice["text"] for choice in answer["choices"]} == {expected}
    assert len(answer["choices"]) == (1 if form == "ids" else 2)


def test_choices_are_numbered_by_prompt_and_then_by_completion(api):
    fields = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    answer = both(api, ask(["import os", "class A:"], **fields))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for prompt, choices in (("import os", [0, 1]), ("class A:", [2, 3])):
        alone = api.post(COMPLETIONS, ask(prompt, **fields))["choices"]
        assert [answer["choices"][index]["text"] for index in choices] == [choice["text"] for choice in alone]


def test_echo_repeats_the_prompt_with_its_logprobs(api, tokenizer):
    prompt = "x = '☃' # ünï\n"
    answer = both(api, ask(prompt, echo=True, logprobs=2, max_tokens=5, ignore_eos=True, return_token_ids=True))
    (choice,) = answer["choices"]
    assert choice["text"].startswith(prompt)
    logprobs = choice["logprobs"]
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    assert choice["prompt_token_ids"] == tokenizer.encode(prompt)
    assert logprobs["tokens"] == [tokenizer.token_text(i) for i in ids]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(math.isfinite(value) for value in logprobs["token_logprobs"][1:])
    assert all(len(top) <= 2 for top in logprobs["top_logprobs"][1:])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "�" not in token:
            assert choice["text"][offset : offset + len(token)] == token


def test_echo_of_token_ids_and_without_logprobs(api, tokenizer):
    answer = both(api, ask(tokenizer.encode("import"), echo=True, max_tokens=2, ignore_eos=True))
    assert answer["choices"][0]["text"].startswith("import")
    assert answer["choices"][0]["logprobs"] is None


def test_a_text_can_be_scored_without_making_any(api, tokenizer):
    answer = both(api, ask("import os", echo=True, max_tokens=0, logprobs=0))
    (choice,) = answer["choices"]
    assert choice["text"] == "import os"
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode("import os"))
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_without_echo_begin_with_the_first_new_token(api):
    (choice,) = both(api, ask(logprobs=3, max_tokens=4, ignore_eos=True))["choices"]
    assert choice["logprobs"]["text_offset"][0] == 0
    assert [len(values) for values in choice["logprobs"].values()] == [4] * 4
    chosen = zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True)
    assert all(token == next(iter(top)) for token, top in chosen), "greedy takes the most likely"


@pytest.mark.parametrize("stop", ["bet", " gamma d", "a del", "alpha"])
def test_no_offset_lies_past_a_text_that_was_cut(make_api, stop):
    api = make_api("alpha beta gamma delta")
    (choice,) = both(api, ask(stop=[stop], logprobs=0, return_token_ids=True))["choices"]
    offsets = choice["logprobs"]["text_offset"]
    assert choice["stop_reason"] == stop and len(offsets) == len(choice["token_ids"])
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])


def test_prompt_logprobs_come_once_for_each_choice(api):
    answer = api.post(COMPLETIONS, ask("import os", prompt_logprobs=0, max_tokens=1))
    logprobs = answer["choices"][0]["prompt_logprobs"]
    assert logprobs[0] is None
    assert all(len(entry) == 1 for entry in logprobs[1:])


def test_sampling_fields_reach_the_sampler(make_api, tokenizer):
    api = make_api("alpha beta gamma delta")
    first = tokenizer.encode("alpha beta gamma delta")[0]
    biased = api.post(COMPLETIONS, ask(logit_bias={str(first): -100}, max_tokens=1, return_token_ids=True))
    assert biased["choices"][0]["token_ids"] == [first], "the fake's logits are far apart"
    stopped = api.post(COMPLETIONS, ask(stop=["gam"], include_stop_str_in_output=True))["choices"][0]
    assert stopped["text"] == "alpha beta gam" and stopped["stop_reason"] == "gam"
    by_id = api.post(COMPLETIONS, ask(stop_token_ids=[tokenizer.encode("alpha beta")[-1]]))["choices"][0]
    assert by_id["stop_reason"] == tokenizer.encode("alpha beta")[-1]


@pytest.mark.parametrize(
    "field",
    [
        {"logit_bias": {"7": 100}},
        {"temperature": 2.0, "seed": 1},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 5.0},
        {"temperature": 1.0, "top_k": 3, "seed": 1},
        {"temperature": 1.0, "top_p": 0.5, "seed": 2},
        {"temperature": 1.0, "min_p": 0.9, "seed": 3},
        {"bad_words": ["a"]},
    ],
    ids=lambda field: ",".join(field),
)
def test_a_sampling_field_is_the_engines_own(api, field):
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **field}
    answer = api.post(COMPLETIONS, {"prompt": "def f(x):", **body, "return_token_ids": True})

    async def directly():
        params = replace(api.llm.get_default_sampling_params(), **body)
        return await api.llm.complete("def f(x):", params)

    assert answer["choices"][0]["token_ids"] == api.loop.run(directly()).outputs[0].token_ids


def test_without_fields_the_models_defaults_are_used(api):
    answers = {api.post(COMPLETIONS, {"prompt": "x", "max_tokens": 9, "seed": 4})["choices"][0]["text"]}
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}  # the bundled generation_config.json
    answers |= {api.post(COMPLETIONS, {"prompt": "x", "max_tokens": 9, "seed": 4, **defaults})["choices"][0]["text"]}
    assert len(answers) == 1


def test_special_tokens_show_when_wanted(make_api):
    api = make_api("a<|im_end|>b")
    assert api.post(COMPLETIONS, ask())["choices"][0]["text"] == "ab"
    shown = both(api, ask(skip_special_tokens=False))["choices"][0]["text"]
    assert shown == "a<|im_end|>b"


def test_generate_is_three_fields(make_api):
    api = make_api("one two three")
    answer = api.post("/generate", {"prompt": "Hello", "temperature": 0.0, "top_k": 1, "top_p": 1.0, "max_tokens": 50})
    assert answer.keys() == {"generated_text", "finish_reason", "usage"}
    assert (answer["generated_text"], answer["finish_reason"]) == ("one two three", "stop")
    events = api.stream("/generate", {"prompt": "Hello", "temperature": 0.0})
    assert "".join(event["generated_text"] for event in events) == "one two three"
    assert [event["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["stop"]
    assert events[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events[:-1])


def test_tokenize_and_detokenize_are_inverse(api, tokenizer):
    text = "def f(x): return '☃'<|im_end|>"
    answer = api.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == api.llm.max_model_len
    assert api.post("/detokenize", {"tokens": answer["tokens"]}) == {"prompt": text}
    assert api.post("/tokenize", {"prompt": text})["token_strs"] is None


def test_tokenize_renders_messages_as_chat_does(api):
    messages = [{"role": "user", "content": "Hi"}]
    tokens = api.post("/tokenize", {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}})["tokens"]
    body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 1}
    assert api.post("/v1/chat/completions", {**body, "return_token_ids": True})["prompt_token_ids"] == tokens


def test_the_model_is_listed_and_found(make_api):
    api = make_api(served_model_name="Qwen/Qwen3-0.6B")
    (card,) = api.request("GET", "/v1/models").json()["data"]
    assert card["id"] == "Qwen/Qwen3-0.6B"
    assert card["max_model_len"] == api.llm.max_model_len
    for path in ("/v1/models/Qwen/Qwen3-0.6B", "/v1/models/Qwen%2FQwen3-0.6B"):
        assert api.request("GET", path).json() == card
    assert api.post(COMPLETIONS, ask(model="Qwen/Qwen3-0.6B", max_tokens=1))["model"] == "Qwen/Qwen3-0.6B"


def test_a_folder_is_served_under_its_own_name(make_api, tmp_path):
    (tmp_path / "my-model").mkdir()
    for file in (Path(mili.__file__).parent / "data" / "tiny-qwen3-code").iterdir():
        (tmp_path / "my-model" / file.name).symlink_to(file)
    api = make_api(llm={"model": str(tmp_path / "my-model")})
    assert api.request("GET", "/v1/models").json()["data"][0]["id"] == "my-model"
