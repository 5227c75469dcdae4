"""Messages by hand: what is reasoning, what is content, what is a call; fed at once and token by token."""

from pathlib import Path
from typing import Any

import pytest

import mili
from mili.output_parser import (
    ContentDelta,
    OutputParser,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    reasoning_is_open,
)
from mili.tokenizer import Tokenizer
from support.parsing import ASSISTANT, message, parse, parse_all_ways

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
OPEN = ASSISTANT + "<think>\n"
ARGUMENTS = '{"city": "Zürich ☃", "days": [1, {"n": "}\\"]"}]}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WEATHER, NOW = ("weather", ARGUMENTS), ("now", "{}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        # plain content is the engine's text, newlines and all
        ("Hello\n\nworld\n", None, "Hello\n\nworld\n", []),
        ("\n\n", None, "\n\n", []),
        ("", None, None, []),
        # reasoning
        ("<think>\nhm\n\nso\n</think>\n\nYes.\n", "hm\n\nso", "Yes.\n", []),
        ("<think>\n\n</think>\n\nYes.", None, "Yes.", []),
        ("\n<think>hm</think>Yes.", "hm", "Yes.", []),
        ("<think>\nunfinished\n", "unfinished", None, []),
        ("<think>", None, None, []),
        ("<think>\n<think>\nhm</think>", "hm", None, []),
        ("<think>a<think>b</think>c", "a<think>b", "c", []),
        ("<think>a\n</think>\n<think>\nb</think>c", "ab", "c", []),
        (f"<think>\nI could {OTHER}\n</think>\nNo.", f"I could {OTHER}", "No.", []),
        # think markers with no meaning
        ("a</think>b", None, "a</think>b", []),
        ("Write <think> here</think>", None, "Write <think> here</think>", []),
        (f"{OTHER}<think>x", None, "<think>x", [NOW]),
        # calls
        (CALL, None, None, [WEATHER]),
        (f"<think>\nhm\n</think>\n\nI look.\n{CALL}\n{OTHER}", "hm", "I look.", [WEATHER, NOW]),
        (f"{OTHER}\nDone.", None, "Done.", [NOW]),
        (f"a\n{OTHER}\nb\n{OTHER}\nc", None, "a\nb\nc", [NOW, NOW]),
        ('<tool_call>{"arguments":{"a":1},"id":1.5,"name":"f"}</tool_call>', None, None, [("f", '{"a":1}')]),
        ('<tool_call>{"name": "f"}</tool_call>', None, None, [("f", "{}")]),
        ('<tool_call>{"name":"\\u0066","arguments":{}}</tool_call>', None, None, [("f", "{}")]),
        ('<tool_call>{"name":"f","arguments":{},"more":{"a":[]}}</tool_call>', None, None, [("f", "{}")]),
        # arguments are not repaired
        ('<tool_call>{"name":"f","arguments":{a: oops}}</tool_call>', None, None, [("f", "{a: oops}")]),
        ('<tool_call>{"name":"f","arguments":{"a":1}\n</tool_call>', None, None, [("f", '{"a":1}')]),
        ('<tool_call>{"name":"f","arguments":{"a":1}}}\n</tool_call>', None, None, [("f", '{"a":1}')]),
        (CALL[:60], None, None, [("weather", CALL[45:60])]),
        # text after the object, with and without the marker
        (f"{OTHER[:-13]}\nBye.", None, "Bye.", [NOW]),
        (f"{OTHER[:-14]} Bye.", None, "Bye.", [NOW]),
        (f"{OTHER[:-12]}Bye.</tool_call>", None, "Bye.</tool_call>", [NOW]),
        (f"{OTHER[:-12]}{OTHER}", None, None, [NOW, NOW]),
        (f'<tool_call>{{"name":"f","arguments":{{"a": {OTHER}', None, None, [("f", '{"a": '), NOW]),
        # markers inside JSON strings
        (
            '<tool_call>{"name":"f","arguments":{"a":"<tool_call></tool_call><think>"}}</tool_call>',
            None,
            None,
            [("f", '{"a":"<tool_call></tool_call><think>"}')],
        ),
        (f'<tool_call>{{"name": "f", "argum{OTHER}', None, f'<tool_call>{{"name": "f", "argum{OTHER}', []),
    ],
)
def test_messages(
    tokenizer: Tokenizer, text: str, reasoning: str | None, content: str | None, calls: list[tuple[str, str]]
) -> None:
    assert message(parse_all_ways(tokenizer, text)) == (reasoning, content, calls)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        "{}",
        "[]",
        "not JSON",
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments": "{}"}',
        '{"arguments": {"a": 1}}',
        '{"arguments": {"a": 1}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "\\x", "arguments": {}}',
        '{"na\\xme": "f", "arguments": {}}',
        '{"name": "a\nb", "arguments": {}}',
        '{"name" "f"}',
        '{"name": "f" "arguments": {}}',
        '{"name": "f",}',
        '{name: "f"}',
        '{"name": <think>"f"}',
        '{"name": "f"',
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", "</tool_call>\n\nBye.\n", "", f"\n{OTHER}"])
def test_a_malformed_call_is_content_verbatim(tokenizer: Tokenizer, body: str, end: str) -> None:
    text = f"a\n\n<tool_call>\n{body}{end}"
    parsed = parse_all_ways(tokenizer, text)
    if OTHER in end:
        assert message(parsed) == (None, text.removesuffix(f"\n{OTHER}").rstrip("\n"), [NOW])
    else:
        assert message(parsed) == (None, text, [])


def test_the_prompt_decides_whether_reasoning_is_open(tokenizer: Tokenizer) -> None:
    assert message(parse_all_ways(tokenizer, "hm\n</think>\n\nYes", prompt=OPEN)) == ("hm", "Yes", [])
    assert message(parse_all_ways(tokenizer, "hm\n", prompt=OPEN)) == ("hm", None, [])
    assert message(parse_all_ways(tokenizer, "\n<think>\nhm</think>Yes", prompt=OPEN)) == ("hm", "Yes", [])
    closed = OPEN + "\n</think>\n\n"
    assert message(parse_all_ways(tokenizer, "\nYes", prompt=closed)) == (None, "\nYes", [])
    assert message(parse_all_ways(tokenizer, "<think>hm</think>Yes", prompt=closed)) == ("hm", "Yes", [])


@pytest.mark.parametrize(
    ("prompt", "is_open"),
    [
        (ASSISTANT, False),
        (OPEN, True),
        (OPEN + "so far", True),
        (OPEN + "\n</think>\n\n", False),
        (f"<|im_start|>user\nwhat is <think>?<|im_end|>\n{ASSISTANT}", False),
        (f"{OPEN}<|im_end|>\n{ASSISTANT}", False),
        ("<think>\n", False),
        ("", False),
    ],
)
def test_reasoning_is_open(tokenizer: Tokenizer, prompt: str, is_open: bool) -> None:
    assert reasoning_is_open(tokenizer, tokenizer.encode(prompt)) is is_open


def test_prompts_of_the_chat_template(tokenizer: Tokenizer) -> None:
    for thinking in (True, False):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "<think>"}], enable_thinking=thinking)
        assert not reasoning_is_open(tokenizer, ids)


def test_what_is_not_parsed_is_text(tokenizer: Tokenizer) -> None:
    text = f"<think>\nhm\n</think>\n\nI look.\n{OTHER}\n"
    both = parse_all_ways(tokenizer, text, parse_reasoning=False, parse_tools=False, prompt=OPEN)
    assert message(both) == (None, text, [])
    assert message(parse_all_ways(tokenizer, text, parse_tools=False)) == ("hm", f"I look.\n{OTHER}\n", [])
    no_reasoning = parse_all_ways(tokenizer, text, parse_reasoning=False)
    assert message(no_reasoning) == (None, "<think>\nhm\n</think>\n\nI look.\n", [NOW])


def test_markers_are_known_by_id(tokenizer: Tokenizer) -> None:
    spelt = [i for letter in "<think>hm</think>" for i in tokenizer.encode(letter)]
    assert message(parse_all_ways(tokenizer, spelt)) == (None, "<think>hm</think>", [])


def test_a_tokenizer_without_markers_gives_plain_content(tokenizer: Tokenizer) -> None:
    class Plain(Tokenizer):
        def token_to_id(self, token: str) -> int | None:
            return None

    plain = Plain.from_pretrained(BUNDLED)
    assert message(parse_all_ways(plain, f"<think>a</think>{OTHER}")) == (None, f"<think>a</think>{OTHER}", [])


@pytest.mark.parametrize(
    ("text", "prompt", "count"),
    [
        ("abc", ASSISTANT, 0),
        ("<think>\nhm\n</think>\n\nYes", ASSISTANT, 3),  # newline, hm, newline
        ("<think>a<think>b</think>c", ASSISTANT, 3),
        ("hm", OPEN, 1),
        ("</think>Yes", OPEN, 0),
    ],
)
def test_num_reasoning_tokens(tokenizer: Tokenizer, text: str, prompt: str, count: int) -> None:
    assert len(tokenizer.encode("hm")) in (1, 2)
    expected = count + (len(tokenizer.encode("hm")) - 1 if "hm" in text else 0)
    assert parse_all_ways(tokenizer, text, prompt=prompt).num_reasoning_tokens == expected


def test_deltas_come_as_early_as_they_can(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(
        '<think>\nhm\n</think>\n\nYes\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    )
    parser = OutputParser(tokenizer, [], parse_tools=True)
    fed = ""
    seen: list[tuple[str, Any]] = []
    for token_id in ids:
        fed += tokenizer.token_text(token_id)
        seen += [(fed, delta) for delta in parser.feed([token_id], len(fed))]
    assert parser.feed([], len(fed), finished=True) == []
    for text, delta in seen:
        match delta:
            case ReasoningDelta(new) | ContentDelta(new):
                assert text.endswith(new)
            case ToolCallStart(index, call_id, name):
                assert (index, name, text.endswith('"arguments": {"')) == (0, "f", True)
                assert call_id.startswith("call_") and len(call_id) == 29
            case ToolCallArguments(index, new):
                assert index == 0 and new in text[-4:]
    assert "".join(delta.text for _, delta in seen if isinstance(delta, ToolCallArguments)) == '{"a": 1}'
    assert sum(isinstance(delta, ToolCallArguments) for _, delta in seen) > 3


def test_ids_of_calls_differ(tokenizer: Tokenizer) -> None:
    starts = [d for d in parse(tokenizer, tokenizer.encode(OTHER * 3)).deltas if isinstance(d, ToolCallStart)]
    assert len({start.id for start in starts}) == 3
    assert [start.index for start in starts] == [0, 1, 2]
