"""Where the text ends and what stands between markers: stop strings, special tokens, stop tokens, broken characters."""

from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

import mili
from mili.output_parser import ContentDelta, OutputParser
from mili.tokenizer import Tokenizer
from support.parsing import message, parse, parse_all_ways

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
OTHER = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW = ("now", "{}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    return {tokenizer.token_bytes(i)[0]: i for i in range(256)}


@pytest.mark.parametrize(
    ("text", "stop", "reasoning", "content", "calls"),
    [
        ("<think>hm</think>Yes", "</think>", "hm", None, []),
        ("<think>hm</think>Yes", "m</th", "h", None, []),
        ("<think>hm</think>Yes", "ink>Y", "hm", None, []),
        ("<think>hm</think>Yes", ">hm", None, None, []),
        (f"a\n{OTHER}\nb", "</tool_call>", None, "a", [NOW]),
        (f"a\n{OTHER}\nb", "call>\nb", None, "a", [NOW]),
        (f"a\n{OTHER}\nb", "\n</tool_call>", None, "a", [NOW]),
        (f"a\n{OTHER}\nb", "}\n</tool_call>", None, "a", [NOW]),
        (f"a\n{OTHER}\nb", "{}", None, 'a\n<tool_call>\n{"name": "now", "arguments": ', []),
        (f"a\n{OTHER}\nb", "<tool_call>", None, "a\n", []),
        (f"a\n{OTHER}\nb", "call>\n{", None, "a\n<tool_", []),
        ("a<tool_call>oops</tool_call>b", "call>b", None, "a<tool_call>oops</tool_", []),
        ("a<tool_call>oops</tool_call>b", "</tool_call>", None, "a<tool_call>oops", []),
        ("a</think>b", "think", None, "a</", []),
        (f"a{OTHER}bcd", "cd", None, "ab", [NOW]),
    ],
)
def test_stop_strings(
    tokenizer: Tokenizer, text: str, stop: str, reasoning: str | None, content: str | None, calls: list[Any]
) -> None:
    assert message(parse_all_ways(tokenizer, text, stop=[stop])) == (reasoning, content, calls)


def test_a_stop_string_left_in_the_text(tokenizer: Tokenizer) -> None:
    parsed = parse_all_ways(tokenizer, f"{OTHER}b", stop="</tool_call>", include_stop_str_in_output=True)
    assert message(parsed) == (None, None, [NOW])
    parsed = parse_all_ways(tokenizer, "<think>a</think>b", stop="think>a", include_stop_str_in_output=True)
    assert message(parsed) == ("a", None, [])


def test_text_that_may_begin_a_stop_string_waits(tokenizer: Tokenizer) -> None:
    parsed = parse(tokenizer, tokenizer.encode("abcabd"), chunks=repeat(1), stop=["cabx"])
    assert parsed.content == "abcabd"
    assert parsed.deltas[-1] == ContentDelta("cabd")


@pytest.mark.parametrize(("skip", "content"), [(True, "ab"), (False, "a<|im_start|>b<|im_end|>")])
def test_special_tokens(tokenizer: Tokenizer, skip: bool, content: str) -> None:
    parsed = parse_all_ways(tokenizer, "a<|im_start|>b<|im_end|>", skip_special_tokens=skip)
    assert parsed.content == content


@pytest.mark.parametrize("skip", [True, False])
def test_the_token_that_ends_generation_is_not_shown(tokenizer: Tokenizer, skip: bool) -> None:
    options = {"ends_with_stop_token": True, "skip_special_tokens": skip}
    assert message(parse_all_ways(tokenizer, "a\n<|im_end|>", **options)) == (None, "a\n", [])
    assert message(parse_all_ways(tokenizer, f"{OTHER}", **options)) == (None, None, [NOW])
    assert message(parse_all_ways(tokenizer, "<think>a</think>", **options)) == ("a", None, [])


def test_markers_that_are_special_tokens(byte_ids: dict[int, int]) -> None:
    """Then skip_special_tokens leaves them out of the text, and they act all the same."""
    tokenizer = Tokenizer.from_pretrained(BUNDLED)
    ids = [tokenizer.token_to_id(marker) or 0 for marker in ("<think>", "</think>", "<tool_call>", "</tool_call>")]
    tokenizer.special_ids |= frozenset(ids)
    text = f"<think>\nhm\n</think>\n\nI look.\n{OTHER}"
    assert message(parse_all_ways(tokenizer, text)) == ("hm", "I look.", [NOW])
    assert message(parse_all_ways(tokenizer, text, skip_special_tokens=False)) == ("hm", "I look.", [NOW])
    assert message(parse_all_ways(tokenizer, "a\n<tool_call>oops</tool_call>b")) == (None, "a\noopsb", [])
    assert message(parse_all_ways(tokenizer, "<think>ab</think>cd", stop="cd")) == ("ab", None, [])
    snow = [byte_ids[byte] for byte in "☃".encode()]
    assert message(parse_all_ways(tokenizer, [ids[0], *snow[:2], ids[1], snow[2]])) == (None, "☃", [])


def test_a_marker_in_the_middle_of_a_character(tokenizer: Tokenizer, byte_ids: dict[int, int]) -> None:
    snow = [byte_ids[byte] for byte in "☃".encode()]
    think, end_think, call = (tokenizer.token_to_id(marker) or 0 for marker in ("<think>", "</think>", "<tool_call>"))
    assert message(parse_all_ways(tokenizer, [think, *snow[:2], end_think, *snow])) == ("\ufffd", "☃", [])
    assert message(parse_all_ways(tokenizer, [*snow[:1], call])) == (None, "\ufffd<tool_call>", [])
    assert message(parse_all_ways(tokenizer, [think, end_think, *snow[:2]])) == (None, "\ufffd", [])


def test_a_text_that_is_not_of_these_ids_is_noticed(tokenizer: Tokenizer) -> None:
    with pytest.raises(AssertionError, match="not the beginning"):
        OutputParser(tokenizer, [], parse_tools=True).feed(tokenizer.encode("abc"), 9, finished=True)
