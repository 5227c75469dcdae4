"""Grammars on the bundled tokenizer: every form, its end, what is refused and how soon, and reasoning before it."""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mili
from mili import RequestError, StructuredOutputsParams
from mili.grammar import GrammarCompiler, GrammarState
from mili.tokenizer import Tokenizer

FOLDER = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
VOCAB, EOS, OTHER_STOP = 8192, 8166, 8170


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


def token(text: str) -> int:
    token_id = tokenizer().token_to_id(text)
    assert token_id is not None
    return token_id


THINK, END_THINK, TURN = token("<think>"), token("</think>"), token("<|im_start|>")


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(tokenizer(), VOCAB, [EOS])
    yield made
    made.close()


def allowed(state: GrammarState) -> set[int]:
    """The tokens that may be drawn next."""
    assert state.mask is not None
    assert state.mask.shape == (VOCAB // 32,) and state.mask.dtype == np.int32
    return set(np.flatnonzero(np.unpackbits(state.mask.view(np.uint8), bitorder="little")).tolist())


def advance(compiler: GrammarCompiler, state: GrammarState, token_id: int) -> None:
    state.append(token_id)
    (error,) = compiler.advance([state])
    if error is not None:
        raise error


def start(compiler: GrammarCompiler, prompt: Sequence[int] = (1,), **form: Any) -> GrammarState:
    state = compiler.start(StructuredOutputsParams(**form), prompt, [EOS, OTHER_STOP])
    assert state is not None
    return state


def draw(compiler: GrammarCompiler, seed: int, max_tokens: int = 300, **form: Any) -> str | None:
    """A text of random allowed tokens; None if it has no end after `max_tokens`."""
    state, rng = start(compiler, **form), np.random.default_rng(seed)
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        token_id = int(rng.choice(sorted(allowed(state))))
        if token_id in (EOS, OTHER_STOP):
            return tokenizer().decode(token_ids)
        token_ids.append(token_id)
        advance(compiler, state, token_id)
    return None


def feed(compiler: GrammarCompiler, state: GrammarState, text: str) -> None:
    for token_id in tokenizer().encode(text):
        assert token_id in allowed(state), f"{tokenizer().token_text(token_id)!r} of {text!r} is forbidden"
        advance(compiler, state, token_id)


# --- forms ---

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", 7, None]},
        "home": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "floor": {"type": "boolean"}},
            "required": ["zip", "floor"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "kind", "home"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("schema", [PERSON, json.dumps(PERSON)], ids=["mapping", "text"])
def test_a_schema_with_required_enum_and_nested_parts(compiler: GrammarCompiler, schema: Any) -> None:
    for seed in range(5):
        text = draw(compiler, seed, json=schema)
        assert text is not None
        value = json.loads(text)
        assert set(value) == {"name", "kind", "home"}
        assert len(value["name"]) <= 12
        assert value["kind"] in ("cat", "dog", 7, None)
        assert set(value["home"]) == {"zip", "floor"}
        assert re.fullmatch("[0-9]{5}", value["home"]["zip"])
        assert isinstance(value["home"]["floor"], bool)


def test_a_json_object_may_hold_anything_and_ends_with_its_brace(compiler: GrammarCompiler) -> None:
    state = start(compiler, json_object=True)
    assert all(tokenizer().token_text(i).lstrip().startswith("{") for i in allowed(state))
    feed(compiler, state, '{"a": [1, -2.5e3, {"b": "x\\n"}, true], "c": null')
    assert EOS not in allowed(state)
    feed(compiler, state, "}")
    assert allowed(state) == {EOS, OTHER_STOP}


def test_whitespace_in_json_has_an_end(compiler: GrammarCompiler) -> None:
    state = start(compiler, json_object=True)
    feed(compiler, state, "{")
    (space,) = tokenizer().encode(" ")
    for _ in range(40):
        advance(compiler, state, space)
    assert space not in allowed(state)
    feed(compiler, state, '"a"')


@pytest.mark.parametrize(
    "choices", [["red", "green", "dark blue"], ["a\nb", 'q"\\', "é🙂", "\x00\x7f/", "<think>", ".*"]]
)
def test_a_choice_is_one_of_the_texts(compiler: GrammarCompiler, choices: list[str]) -> None:
    drawn = {draw(compiler, seed, choice=choices) for seed in range(40)}
    assert drawn == set(choices)


def test_a_choice_ends_where_it_can_and_where_it_must(compiler: GrammarCompiler) -> None:
    state = start(compiler, choice=["re", "red", "blue"])
    assert EOS not in allowed(state)
    feed(compiler, state, "re")
    assert {EOS, OTHER_STOP} < allowed(state)
    feed(compiler, state, "d")
    assert allowed(state) == {EOS, OTHER_STOP}


def test_an_empty_choice_may_end_at_once(compiler: GrammarCompiler) -> None:
    assert EOS in allowed(start(compiler, choice=["", "a"]))
    assert allowed(start(compiler, choice=[""])) == {EOS, OTHER_STOP}


def test_a_regex_is_matched_by_the_whole_text(compiler: GrammarCompiler) -> None:
    pattern = "[a-c]{2,9}-[0-9]{3}(/x)?"
    for seed in range(10):
        assert re.fullmatch(pattern, draw(compiler, seed, regex=pattern) or "")
    state = start(compiler, regex=pattern)
    feed(compiler, state, "abc-123")
    assert {EOS, OTHER_STOP} < allowed(state)


def test_a_lark_grammar_may_be_recursive(compiler: GrammarCompiler) -> None:
    grammar = 'start: e\ne: "(" e ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'
    state = start(compiler, grammar=grammar)
    feed(compiler, state, "((42)")
    assert EOS not in allowed(state)
    feed(compiler, state, ")")
    assert allowed(state) == {EOS, OTHER_STOP}


def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    assert not allowed(start(compiler, regex="(.|\n)*")) & (tokenizer().special_ids - {EOS, OTHER_STOP} | {THINK})


def test_padding_of_the_vocabulary_is_forbidden() -> None:
    padded = GrammarCompiler(tokenizer(), VOCAB + 40, [EOS])
    state = padded.start(StructuredOutputsParams(regex="(.|\n)*"), [1], [EOS])
    assert state is not None and state.mask is not None and state.mask.shape == (-(-(VOCAB + 40) // 32),)
    assert not np.unpackbits(state.mask.view(np.uint8), bitorder="little")[VOCAB:].any()
    padded.close()


# --- where it begins ---


def prompt(*parts: int | str) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer().encode(part))]


@pytest.mark.parametrize(
    "parts",
    [
        ("no turns at all",),
        ("a <think> in a completion", THINK),
        (TURN, "user\nhi", TURN, "assistant\n", THINK, "\n\n", END_THINK, "\n\n"),
        (TURN, "assistant\n", THINK, "a", END_THINK, "b", THINK, "c", END_THINK),
    ],
)
def test_the_grammar_begins_at_once(compiler: GrammarCompiler, parts: tuple[int | str, ...]) -> None:
    state = start(compiler, prompt(*parts), choice=["yes", "no"])
    assert allowed(state) == allowed(start(compiler, choice=["yes", "no"]))


@pytest.mark.parametrize(
    "parts",
    [
        (TURN, "user\nhi", TURN, "assistant\n", THINK, "\n"),
        (TURN, "assistant\n", THINK, "a", END_THINK, TURN, "user\nx", TURN, "assistant\n", THINK),
    ],
)
def test_the_grammar_begins_after_an_open_think(compiler: GrammarCompiler, parts: tuple[int | str, ...]) -> None:
    state = start(compiler, prompt(*parts), choice=["yes", "no"])
    assert state.mask is None
    for token_id in (*tokenizer().encode("so yes, or"), THINK, EOS - 1):
        advance(compiler, state, token_id)
        assert state.mask is None
    advance(compiler, state, END_THINK)
    assert allowed(state) == allowed(start(compiler, choice=["yes", "no"]))


def test_a_turn_without_either_may_think_first_or_not(compiler: GrammarCompiler) -> None:
    turn = prompt(TURN, "user\n", THINK, "x", END_THINK, TURN, "assistant\n")
    plain = allowed(start(compiler, choice=["yes", "no"]))
    state = start(compiler, turn, choice=["yes", "no"])
    assert allowed(state) == plain | {THINK}
    feed(compiler, state, "no")
    assert allowed(state) == {EOS, OTHER_STOP}
    state = start(compiler, turn, choice=["yes", "no"])
    advance(compiler, state, THINK)
    assert state.mask is None
    advance(compiler, state, END_THINK)
    assert allowed(state) == plain


# --- what is refused ---


def chain(num_refs: int) -> dict[str, Any]:
    refs = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(num_refs)}
    return {"$defs": refs | {f"d{num_refs}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    "form, message",
    [
        ({"json": {"enum": []}}, "json cannot be used.*[Uu]nsatisfiable"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "json cannot be used.*minimum"),
        ({"json": {"type": "strin"}}, "json cannot be used.*strin"),
        ({"json": {"uniqueItems": True, "type": "array"}}, "json cannot be used.*uniqueItems"),
        ({"json": {"$ref": "http://example.com/schema"}}, "json cannot be used"),
        ({"json": {"$ref": "#"}}, "json cannot be used, no text has this form"),
        ({"regex": "["}, "regex cannot be used.*unclosed"),
        ({"regex": "(?=a)b"}, "regex cannot be used.*look-around"),
        ({"regex": "(" * 5000 + "a" + ")" * 5000}, "regex cannot be used"),
        ({"grammar": "nonsense"}, "grammar cannot be used"),
        ({"grammar": "start: start"}, "grammar cannot be used, no text has this form"),
        ({"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000}, "grammar cannot be used.*nested"),
        ({"grammar": "start: <no_such_token>"}, "grammar cannot be used"),
        ({"json": chain(1500)}, "json is too large or too deep"),
        ({"json": {"type": "integer", "multipleOf": 99_999_989}}, "json is too large or too deep"),
    ],
)
def test_impossible_and_hostile_forms_are_refused_soon(
    compiler: GrammarCompiler, form: dict[str, Any], message: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(RequestError, match=f"structured_outputs.{message}") as caught:
        compiler.check(StructuredOutputsParams(**form))
    assert time.monotonic() - begun < 20  # 3 s at most, and on a loaded machine the process starts again
    assert len(str(caught.value)) < 600
    compiler.check(StructuredOutputsParams(regex="[ab]"))


def test_a_model_without_an_end_is_refused() -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(tokenizer(), VOCAB, []).check(StructuredOutputsParams(json_object=True))


def test_a_token_that_the_mask_forbids_is_an_error_of_its_state_alone(compiler: GrammarCompiler) -> None:
    good, bad = start(compiler, regex="ab*"), start(compiler, regex="ab*")
    for state, text in ((good, "a"), (bad, "x")):
        state.append(tokenizer().encode(text)[0])
    errors = compiler.advance([good, bad])
    assert errors[0] is None
    assert isinstance(errors[1], RequestError) and "bad_words" in str(errors[1])
    assert EOS in allowed(good)


def test_a_grammar_that_explodes_midway_is_an_error_of_its_state_alone(compiler: GrammarCompiler) -> None:
    good, bad = start(compiler, regex="a*"), start(compiler, regex="(a?){5000}a{5000}")
    errors: list[Exception | None] = [None]
    while errors[-1] is None:
        for state in (good, bad):
            state.append(tokenizer().encode("a")[0])
        errors = compiler.advance([good, bad])
    assert errors[0] is None
    assert isinstance(errors[1], RequestError)
    assert EOS in allowed(good)


# --- one compiler for many ---


def test_completions_of_one_form_do_not_share_their_place(compiler: GrammarCompiler) -> None:
    first, second = (start(compiler, choice=["ab", "cd"]) for _ in range(2))
    before = allowed(second)
    feed(compiler, first, "ab")
    assert allowed(second) == before
    feed(compiler, second, "cd")
    assert allowed(first) == allowed(second) == {EOS, OTHER_STOP}


def test_masks_of_many_states_are_those_of_each_alone(compiler: GrammarCompiler) -> None:
    forms: list[dict[str, Any]] = [{"regex": "[a-z]*"}, {"json_object": True}, {"choice": ["x", "{"]}, {"json": PERSON}]
    together, alone = ([start(compiler, **form) for form in forms] for _ in range(2))
    for state, single, text in zip(together, alone, ["a", "{", "x", "{"], strict=True):
        state.append(tokenizer().encode(text)[0])
        advance(compiler, single, tokenizer().encode(text)[0])
    assert compiler.advance(together) == [None] * 4
    assert [allowed(state) for state in together] == [allowed(state) for state in alone]


def test_threads_may_check_at_once(compiler: GrammarCompiler) -> None:
    outcomes: list[str] = []

    def check(number: int) -> None:
        try:
            compiler.check(StructuredOutputsParams(regex=f"a{{{number}}}" if number % 3 else f"({number}"))
            outcomes.append("fine")
        except RequestError:
            outcomes.append("refused")

    threads = [threading.Thread(target=check, args=(number,)) for number in range(12)]
    run(threads)
    assert sorted(outcomes) == ["fine"] * 8 + ["refused"] * 4


def run(threads: list[threading.Thread]) -> None:
    each: list[Callable[[threading.Thread], object]] = [threading.Thread.start, threading.Thread.join]
    for act in each:
        for thread in threads:
            act(thread)
