"""Tools and tool_choice: what is refused, and what the grammar lets the model write."""

import functools
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

import mili
from mili.errors import RequestError
from mili.tokenizer import Tokenizer
from mili.tool_calls import ToolChoice, check_tool_choice, check_tools, tool_call_grammar
from support.parsing import parse
from support.qwen3_tokenizer import qwen3_tokenizer_folder

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 1}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"enum": [1, 2, 3]}},
}
WEATHER = {"type": "function", "function": {"name": "get-weather", "description": "…", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


GOOD = call("get-weather", '{"city": "Zürich 你好", "days": 2}')


@pytest.fixture(scope="module", params=["qwen3", "bundled"])
def folder(request: pytest.FixtureRequest) -> Path:
    return qwen3_tokenizer_folder() if request.param == "qwen3" else BUNDLED


@functools.cache
def load(folder: Path) -> tuple[Tokenizer, LLTokenizer]:
    tokenizer = Tokenizer.from_pretrained(folder)
    backend = LLTokenizer(str(folder / "tokenizer.json"), eos_token=tokenizer.token_to_id("<|im_end|>"))
    return tokenizer, backend


def allows(folder: Path, grammar: str | None, text: str) -> bool:
    """Whether the tokens of `text` are a whole answer of `grammar`."""
    assert grammar is not None
    tokenizer, backend = load(folder)
    matcher = LLMatcher(backend, LLMatcher.grammar_from_lark(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


# Reading


def test_tools_are_read() -> None:
    weather, now, strict = check_tools([WEATHER, NOW, {**STRICT, "function": {**STRICT["function"], "name": "s"}}])
    assert (weather.name, weather.parameters, weather.strict) == ("get-weather", CITY, False)
    assert (now.name, now.parameters) == ("now", {"type": "object", "additionalProperties": False})
    assert strict.strict
    assert check_tools(None) == check_tools([]) == []
    assert check_tools([function(parameters={})])[0].parameters == {"type": "object"}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({}, "tools must be a list, got {}"),
        ([NOW, "now"], r"tools\[1\] must be an object, got 'now'"),
        ([{"function": {"name": "f"}}], r"tools\[0\]\.type must be 'function', got None"),
        ([{"type": "web_search"}], r"tools\[0\]\.type must be 'function', got 'web_search'"),
        ([{"type": "function"}], r"tools\[0\]\.function must be an object, got None"),
        ([{"type": "function", "function": {}}], r"tools\[0\]\.function\.name must be 1 to 64 .*, got None"),
        ([function(name="")], r"tools\[0\]\.function\.name .* got ''"),
        ([function(name="a b")], r"tools\[0\]\.function\.name .* got 'a b'"),
        ([function(name="a\n")], r"tools\[0\]\.function\.name .* got 'a\\n'"),
        ([function(name="é")], r"tools\[0\]\.function\.name .* got 'é'"),
        ([function(name="x" * 65)], r"tools\[0\]\.function\.name "),
        ([function(name="x" * 5000)], r"got 'x{99}\.\.\.$"),
        ([function(description=5)], r"tools\[0\]\.function\.description must be a string, got 5"),
        ([function(strict="yes")], r"tools\[0\]\.function\.strict must be true or false, got 'yes'"),
        ([function(parameters=[])], r"tools\[0\]\.function\.parameters must be a JSON schema object, got \[\]"),
        (
            [function(parameters={"type": "string"})],
            r"tools\[0\]\.function\.parameters\.type must be 'object', got 'string'",
        ),
        ([NOW, WEATHER, NOW], r"tools\[2\]\.function\.name is 'now', as in tools\[0\]"),
    ],
)
def test_bad_tools(tools: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_tools(tools)


@pytest.mark.parametrize(
    ("choice", "read"),
    [
        (None, ToolChoice("auto")),
        ("auto", ToolChoice("auto")),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "now"}}, ToolChoice("required", "now")),
    ],
)
def test_tool_choice_is_read(choice: Any, read: ToolChoice) -> None:
    assert check_tool_choice(choice, check_tools([WEATHER, NOW])) == read


def test_tool_choice_without_tools() -> None:
    assert check_tool_choice(None, []) == check_tool_choice("none", []) == ToolChoice("none")
    assert check_tool_choice("auto", []) == ToolChoice("auto")
    with pytest.raises(RequestError, match="tool_choice is 'required' but the request has no tools"):
        check_tool_choice("required", [])
    with pytest.raises(RequestError, match=r"one of tools \(there are none\)"):
        check_tool_choice({"type": "function", "function": {"name": "now"}}, [])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("any", "tool_choice must be none, auto, required or .* got 'any'"),
        (["auto"], r"tool_choice must be .* got \['auto'\]"),
        (True, "tool_choice must be .* got True"),
        ({"type": "tool"}, "tool_choice.type must be 'function', got 'tool'"),
        ({"type": "function"}, "tool_choice.function must be an object, got None"),
        ({"type": "function", "function": {"name": "g"}}, r"one of tools \(get-weather, now\), got 'g'"),
        ({"type": "function", "function": {"name": []}}, r"one of tools \(get-weather, now\), got \[\]"),
    ],
)
def test_bad_tool_choice(choice: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_tool_choice(choice, check_tools([WEATHER, NOW]))


# The grammar


@pytest.mark.parametrize(
    ("text", "one", "many"),
    [
        (GOOD, True, True),
        (call("now", "{}"), True, True),
        ("\n\n" + GOOD, True, True),
        (call("get-weather", '{"city":"x"}'), True, True),
        (f"{GOOD}\n{call('now', '{}')}", False, True),
        ("", False, False),
        ("I look.", False, False),
        (f"I look.\n{GOOD}", False, False),
        (f"{GOOD}\nDone.", False, False),
        (GOOD[:-20], False, False),
        (GOOD.removesuffix("</tool_call>"), False, False),
        (call("weather", '{"city": "x"}'), False, False),
        (call("get-weather", "{}"), False, False),
        (call("get-weather", '{"city": ""}'), False, False),
        (call("get-weather", '{"city": "x", "days": 4}'), False, False),
        (call("get-weather", '{"city": "x", "more": 4}'), False, False),
        (call("get-weather", '{"city": "</tool_call>"}'), False, False),
        (call("now", '{"city": "x"}'), False, False),
    ],
)
def test_required(folder: Path, text: str, one: bool, many: bool) -> None:
    functions = check_tools([WEATHER, NOW])
    choice = check_tool_choice("required", functions)
    assert allows(folder, tool_call_grammar(functions, choice, parallel=False), text) is one
    assert allows(folder, tool_call_grammar(functions, choice), text) is many


def test_named(folder: Path) -> None:
    functions = check_tools([WEATHER, NOW])
    grammar = tool_call_grammar(
        functions, check_tool_choice({"type": "function", "function": {"name": "now"}}, functions)
    )
    assert allows(folder, grammar, call("now", "{}"))
    assert not allows(folder, grammar, GOOD)


def test_any_answer_needs_no_grammar() -> None:
    functions = check_tools([WEATHER, NOW])
    assert tool_call_grammar(functions, ToolChoice("auto")) is None
    assert tool_call_grammar(check_tools([STRICT]), ToolChoice("none"), parallel=False) is None
    assert tool_call_grammar([], ToolChoice("auto"), parallel=False) is None


@pytest.mark.parametrize(
    ("text", "one", "strict"),
    [
        ("", True, True),
        ("Hello!\nHow are you?\n", True, True),
        (GOOD, True, True),
        (f"I look.\n{GOOD}", True, True),
        (f"{GOOD}\n{GOOD}", False, True),
        (f"{GOOD}\nDone.", False, False),
        (call("get-weather", '{"days": 9}'), True, False),
        (call("get-weather", "[]"), False, False),
        (call("now", '{"any": "thing"}'), True, True),
        (call("other", "{}"), False, False),
        ("a <tool_call> b", False, False),
    ],
)
def test_auto(folder: Path, text: str, one: bool, strict: bool) -> None:
    """One call at most, of functions that are not strict; and any number of calls where one function is."""
    plain, mixed = check_tools([WEATHER, NOW]), check_tools([STRICT, NOW])
    assert allows(folder, tool_call_grammar(plain, ToolChoice("auto"), parallel=False), text) is one
    assert allows(folder, tool_call_grammar(mixed, ToolChoice("auto")), text) is strict


def test_the_parser_reads_what_the_grammar_allows(folder: Path) -> None:
    tokenizer, _ = load(folder)
    assert parse(tokenizer, tokenizer.encode(GOOD)).calls == [("get-weather", '{"city": "Zürich 你好", "days": 2}')]
