"""Structured outputs of the real model on the CPU: forms are kept whatever is drawn, and neighbours notice nothing."""

import json
import re
from collections.abc import Iterator

import pytest

from mili import LLM, RequestError, RequestOutput, SamplingParams, StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "kind", "home"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu") as made:
        yield made


def generate(llm: LLM, prompts: list[str], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def bound(form: StructuredOutputsParams, seed: int = 0, **options) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "seed": seed, "structured_outputs": form, **options})


def check_person(text: str) -> None:
    value = json.loads(text)
    assert {"name", "age", "kind", "home"} <= set(value) <= set(PERSON["properties"])
    assert isinstance(value["name"], str) and len(value["name"]) <= 10
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert value["kind"] in ("cat", "dog")
    assert all(isinstance(tag, bool) for tag in value.get("tags", [])) and len(value.get("tags", [])) <= 3
    assert set(value["home"]) == {"zip"} and re.fullmatch("[0-9]{5}", value["home"]["zip"])


def test_a_schema_is_kept_whatever_is_drawn(llm: LLM) -> None:
    form = StructuredOutputsParams(json=PERSON)
    outputs = generate(llm, ["person = "] * 12, [bound(form, seed) for seed in range(12)])
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop"
        check_person(output.text)
    assert len({output.text for output in outputs}) == 12


def test_greedy_and_filtered_draws_keep_it_too(llm: LLM) -> None:
    form = StructuredOutputsParams(json=PERSON)
    options = [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1}, {"temperature": 5.0}]
    options.append({"repetition_penalty": 1.5, "frequency_penalty": 1.0, "logit_bias": {5: 100.0}})
    for output in generate(llm, ["person = "] * len(options), [bound(form, 1, **option) for option in options]):
        check_person(output.text)


def test_a_choice_a_regex_and_a_grammar(llm: LLM) -> None:
    choices = ("yes", "no", "it depends")
    forms = [
        StructuredOutputsParams(choice=choices),
        StructuredOutputsParams(regex="v[0-9]+\\.[0-9]{2}"),
        StructuredOutputsParams(grammar='start: e\ne: "(" e ")" | N\nN: /[0-9]{1,3}/'),
    ]
    for seed in range(4):
        chosen, version, nested = generate(llm, ["answer: "] * 3, [bound(form, seed, max_tokens=200) for form in forms])
        assert chosen.text in choices
        assert re.fullmatch(r"v[0-9]+\.[0-9]{2}", version.text) or version.outputs[0].finish_reason == "length"
        assert re.fullmatch(r"\(*[0-9]{1,3}\)*", nested.text) or nested.outputs[0].finish_reason == "length"
        if nested.outputs[0].finish_reason == "stop":
            assert nested.text.count("(") == nested.text.count(")")


def test_neighbours_are_the_same_to_the_bit_with_and_without_a_form_beside_them(llm: LLM) -> None:
    prompts = ["def add(a, b):", "import os\n", "class Point:"]
    params = [SamplingParams(temperature=0.9, seed=i, max_tokens=24, ignore_eos=True, logprobs=5) for i in range(3)]
    alone = generate(llm, prompts, params)
    form = bound(StructuredOutputsParams(json=PERSON))
    beside = generate(llm, [prompts[0], "x = ", *prompts[1:]], [params[0], form, *params[1:]])
    check_person(beside.pop(1).text)
    for first, second in zip(alone, beside, strict=True):
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        assert first.outputs[0].logprobs == second.outputs[0].logprobs


def test_with_logprobs_n_and_stop(llm: LLM) -> None:
    form = StructuredOutputsParams(json=PERSON)
    (output,) = generate(llm, ["person = "], [bound(form, 3, n=2, logprobs=2)])
    for completion in output.outputs:
        check_person(completion.text)
        assert len(completion.logprobs) == len(completion.token_ids)
        assert all(
            entry[token].logprob <= 0 for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
        )
    assert output.outputs[0].text != output.outputs[1].text
    (again,) = generate(llm, ["person = "], [bound(form, 4)])
    assert again.outputs[0].token_ids == output.outputs[1].token_ids
    (stopped,) = generate(llm, ["person = "], [bound(form, 3, stop='"age"')])
    assert stopped.outputs[0].stop_reason == '"age"'
    assert output.outputs[0].text.startswith(stopped.text)


def test_streamed_it_is_the_same(llm: LLM) -> None:
    params = bound(StructuredOutputsParams(json=PERSON), 5)
    (whole,) = generate(llm, ["person = "], [params])
    *_, last = llm.stream("person = ", params)
    assert last.text == whole.text


def test_one_bad_form_refuses_the_list_before_it_begins(llm: LLM) -> None:
    good, bad = bound(StructuredOutputsParams(json_object=True)), bound(StructuredOutputsParams(json={"enum": []}))
    before = llm.get_metrics()["prompt_tokens_total"]
    with pytest.raises(RequestError, match="cannot be used"):
        generate(llm, ["a", "b"], [good, bad])
    assert llm.get_metrics()["prompt_tokens_total"] == before
