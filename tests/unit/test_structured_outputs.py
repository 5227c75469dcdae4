"""StructuredOutputsParams: exactly one form, bounded and normalised; and what SamplingParams makes of it."""

import json
import random
from typing import Any

import pytest

from mili import RequestError, SamplingParams, StructuredOutputsParams
from mili.structured_outputs import MAX_FORM_BYTES, MAX_JSON_NESTING


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({"json": {"type": "string"}}, "json"),
        ({"json": '{"type": "string"}'}, "json"),
        ({"json_object": True}, "json_object"),
        ({"regex": "a+"}, "regex"),
        ({"choice": ["yes", ""]}, "choice"),
        ({"grammar": 'start: "a"'}, "grammar"),
    ],
)
def test_one_form_is_taken(fields: dict[str, Any], kind: str) -> None:
    form = StructuredOutputsParams(**fields)
    assert form.kind == kind
    assert form == StructuredOutputsParams(**fields) and hash(form) == hash(StructuredOutputsParams(**fields))


def test_values_are_normalised_and_private() -> None:
    schema, choices = {"type": "string"}, ["a", "b"]
    form, other = StructuredOutputsParams(json=schema), StructuredOutputsParams(choice=choices)
    schema["type"] = "integer"
    choices.append("c")
    assert json.loads(form.json) == {"type": "string"}
    assert other.choice == ("a", "b")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def circular() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object: got none"),
        ({"regex": "a", "choice": ["b"]}, "got regex, choice"),
        ({"json": "{"}, r"structured_outputs.json is not a JSON schema"),
        ({"json": "[1]"}, "json must be a JSON object, got list"),
        ({"json": "true"}, "json must be a JSON object, got bool"),
        ({"json": 7}, "json must be a non-empty string, got 7"),
        ({"json": {"a": {1, 2}}}, "json is not a JSON schema.*set"),
        ({"json": {"a": float("nan")}}, "json is not a JSON schema"),
        ({"json": circular()}, "json is not a JSON schema.*[Cc]ircular"),
        ({"json": nested(MAX_JSON_NESTING + 1)}, f"nested more than {MAX_JSON_NESTING} deep"),
        ({"json": nested(200_000)}, "nested more than"),
        ({"json": '{"a":' * 20_000 + "1" + "}" * 20_000}, "nested more than"),
        ({"json": '{"a":' + "[" * 60_000 + "]" * 60_000 + "}"}, "nested more than"),
        ({"json": {"a": "x" * MAX_FORM_BYTES}}, f"json has .* bytes, the limit is {MAX_FORM_BYTES}"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"regex": 5}, "regex must be a non-empty string, got 5"),
        ({"regex": "é" * MAX_FORM_BYTES}, "regex has 262144 bytes"),
        ({"regex": "\ud800"}, "regex is not valid Unicode"),
        ({"choice": "yes"}, "choice must be a list of strings"),
        ({"choice": 5}, "choice must be a list of strings"),
        ({"choice": []}, "choice is empty"),
        ({"choice": ["a", 5]}, "choice must hold strings, got 5"),
        ({"choice": ["x" * 1000] * 200}, "choice has 200000 bytes"),
        ({"grammar": ""}, "grammar must be a non-empty string"),
        ({"json_object": False}, "json_object must be True or left out, got False"),
    ],
)
def test_what_is_no_form_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**fields)


def test_the_deepest_schema_that_is_taken() -> None:
    StructuredOutputsParams(json=nested(MAX_JSON_NESTING))
    StructuredOutputsParams(json=json.dumps(nested(MAX_JSON_NESTING)))


def test_no_text_makes_it_raise_anything_else() -> None:
    draw = random.Random(3)
    for _ in range(300):
        text = "".join(draw.choice('{}[]",:\\ua1\ud800é ') for _ in range(draw.randrange(40)))
        for name in ("json", "regex", "grammar"):
            try:
                StructuredOutputsParams(**{name: text})
            except RequestError as error:
                assert name in str(error)


@pytest.mark.parametrize("field", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_decides_the_end_otherwise_contradicts_it(field: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"{next(iter(field))} contradicts structured_outputs"):
        SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True), **field)


@pytest.mark.parametrize("value", [{"json_object": True}, "json", True])
def test_only_its_own_type_is_taken(value: Any) -> None:
    with pytest.raises(RequestError, match="structured_outputs must be StructuredOutputsParams"):
        SamplingParams(structured_outputs=value)
