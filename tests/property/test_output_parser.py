"""A message is the same however its tokens were cut into pieces, and what it is made of comes out of it again."""

import functools
import json
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, given, settings

import mili
from mili import marked_text, output_parser, tool_call_scanner
from mili.tokenizer import Tokenizer
from support.mutants import copy_with, mutant
from support.parsing import ASSISTANT, Parsed, parse
from support.qwen3_tokenizer import qwen3_tokenizer_folder

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PROMPTS = (ASSISTANT, ASSISTANT + "<think>\n", ASSISTANT + "<think>\n\n</think>\n\n", "def f(")

# Latin with accents, Cyrillic, Devanagari, Chinese, Hangul, Arabic, emoji joined by U+200D, and what JSON is made of.
SNIPPETS = [
    "hm",
    "Zürich",
    "Привет",
    "नमस्ते",
    "你好",
    "한국어",
    "مرحبا",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "\n",
    "\n\n",
    " ",
    "\t",
    "x\n",
]
JSON_SNIPPETS = [
    *('{"name": "f"', '"name"', ': "f"', ', "arguments": {', '"arguments": ', '{"a": 12'),
    *("}", "{", "]", '"', "\\", '\\"', ",", "1.5"),
]
WHOLE_CALLS = [
    '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}\\"]"]}}\n</tool_call>',
    '<tool_call>{"id": -1.5e3, "arguments": {"ключ": "値"}, "name": "g"}</tool_call>',
    '<tool_call>\n{"name": "f"}\n</tool_call>',
    '<tool_call>\n{"nam": "f", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}, "b": [1, 2]} and more</tool_call>',
]


@pytest.fixture(scope="module", params=["qwen3", "bundled"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load(qwen3_tokenizer_folder() if request.param == "qwen3" else BUNDLED)


@functools.cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@st.composite
def soups(draw: st.DrawFn, tokenizer: Tokenizer) -> tuple[list[int], dict[str, Any]]:
    """Anything a model might emit, whole calls and broken ones among it, and how generation was asked to stop."""
    markers = [tokenizer.token_to_id(marker) or 0 for marker in MARKERS]
    single_bytes = st.integers(0, 255)  # ids 0..255 are the single bytes in both vocabularies
    encoded = [tokenizer.encode(text) for text in SNIPPETS + JSON_SNIPPETS + WHOLE_CALLS]
    spoonful = st.one_of(
        st.sampled_from(markers).map(lambda i: [i]),
        st.sampled_from(encoded),
        st.sampled_from(encoded),
        single_bytes.map(lambda i: [i]),
        st.sampled_from(sorted(tokenizer.special_ids)).map(lambda i: [i]),
        st.text(max_size=4).map(tokenizer.encode),
    )
    ids = [i for part in draw(st.lists(spoonful, max_size=14)) for i in part]
    skip = draw(st.booleans())
    text = tokenizer.decode(ids, skip_special_tokens=skip)
    starts = draw(st.lists(st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 14)), max_size=2))
    options = {
        "prompt": draw(st.sampled_from(PROMPTS)),
        "skip_special_tokens": skip,
        "stop": [stop for start, size in starts if (stop := text[start : start + size])],
        "include_stop_str_in_output": draw(st.booleans()),
        "ends_with_stop_token": draw(st.booleans()),
    }
    return ids, options


chunkings = st.lists(st.integers(1, 9), max_size=30).map(lambda sizes: [*sizes, *[1] * 500])


def check_chunking(
    tokenizer: Tokenizer, module: ModuleType, ids: list[int], options: dict[str, Any], chunks: list[int], apart: bool
) -> None:
    whole = parse(tokenizer, ids, module=module, **options)
    for sizes in (chunks, [1] * 500):
        assert parse(tokenizer, ids, chunks=sizes, finish_apart=apart, module=module, **options) == whole
    check_nothing_is_lost(tokenizer, ids, options, whole)


def check_nothing_is_lost(tokenizer: Tokenizer, ids: list[int], options: dict[str, Any], whole: Parsed) -> None:
    """Without reasoning and calls the content is the engine's text, malformed calls and all."""
    thinks = {tokenizer.token_to_id(marker) for marker in MARKERS[:2]}
    # A stop token that is not shown, and is part of a character, may repair the U+FFFD that the engine shows before it.
    fragment = options["ends_with_stop_token"] and ids and "\ufffd" in tokenizer.token_text(ids[-1])
    if not whole.calls and not thinks & set(ids) and options["prompt"] != PROMPTS[1] and not fragment:
        assert (whole.content or "") == whole.text


@settings(max_examples=400, deadline=None)
@given(data=st.data(), chunks=chunkings, apart=st.booleans())
def test_every_chunking_gives_the_one_shot_message(
    tokenizer: Tokenizer, data: st.DataObject, chunks: list[int], apart: bool
) -> None:
    ids, options = data.draw(soups(tokenizer))
    check_chunking(tokenizer, output_parser, ids, options, chunks, apart)


# Text without "<", so that it spells no marker, and composed as the tokenizer's NFC would.
texts = (st.text(max_size=12) | st.lists(st.sampled_from(SNIPPETS), max_size=5).map("".join)).map(
    lambda text: unicodedata.normalize("NFC", text.replace("<", "").replace("\x00", ""))
)
bodies = texts.map(lambda text: text.strip("\n"))
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts | st.sampled_from(MARKERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, str]:
    arguments = json.dumps(
        draw(st.dictionaries(texts, values, max_size=3)),
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
    )
    return draw(names), unicodedata.normalize("NFC", arguments)


@settings(max_examples=200, deadline=None)
@given(reasoning=st.none() | bodies, content=bodies, made=st.lists(calls(), max_size=3), chunks=chunkings)
def test_what_a_message_was_made_of_comes_back(
    tokenizer: Tokenizer, reasoning: str | None, content: str, made: list[tuple[str, str]], chunks: list[int]
) -> None:
    check_parts(tokenizer, output_parser, reasoning, content, made, chunks)


def check_parts(
    tokenizer: Tokenizer,
    module: ModuleType,
    reasoning: str | None,
    content: str,
    made: list[tuple[str, str]],
    chunks: list[int],
) -> None:
    """A message as Qwen3's template writes it."""
    text = "" if reasoning is None else f"<think>\n{reasoning}\n</think>\n\n"
    text += content
    for name, arguments in made:
        text += f'\n<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    parsed = parse(tokenizer, ids, chunks=chunks, module=module)
    assert (parsed.reasoning, parsed.content, parsed.calls) == (reasoning or None, content or None, made)


def parser_with(module: ModuleType, old: str, new: str) -> ModuleType:
    """The parser in which the source text `old` of `module`, itself or one it uses, reads `new`."""
    broken = mutant(module, old, new)
    if module is marked_text:
        return copy_with(output_parser, MarkedText=broken.MarkedText)
    if module is tool_call_scanner:
        return copy_with(output_parser, ToolCallScanner=broken.ToolCallScanner)
    return broken


SEARCH = settings(max_examples=2000, deadline=None, database=None, derandomize=True, phases=[Phase.generate])

BUGS = {
    "text before the engine shows it": (marked_text, "piece.text[: text_len - self._position]", "piece.text"),
    "tokens counted again": (marked_text, "piece.text[len(shown) :], 0", "piece.text[len(shown) :], piece.num_tokens"),
    "hidden tokens not counted": (marked_text, "sum(piece.num_tokens for piece in hidden)", "0"),
    "no last character": (marked_text, "self._detokenizer.finish()", '""'),
    "a marker before it is all shown": (marked_text, "and piece.marker is not None and not finished", "and False"),
    "an escape ends with the piece": (tool_call_scanner, "self._escaped = True", "at += 1"),
    "a scalar ends with the piece": (tool_call_scanner, "return at, at < len(text)", "return at, True"),
    "announced before the name": (tool_call_scanner, "self.announced = self.name is not None", "self.announced = True"),
    "newlines end with the piece": (output_parser, "self._held += len", "self._held = len"),
    "newlines before a malformed call are lost": (output_parser, '= "\\n" * self._held + shown, 0', "= shown, 0"),
    "a malformed call is lost": (output_parser, "self._take_prose(self._body)", "pass"),
    "text after a call is lost": (output_parser, "self._take_tail(self._scanner.rest)", "pass"),
    "held newlines are lost at the end": (output_parser, "_State.REASONING and self._held:", "_State.REASONING and 0:"),
    "the first piece of a malformed call only": (
        output_parser,
        "self._body += text",
        "self._body = self._body or text",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str) -> None:
    tokenizer, module = load(BUNDLED), parser_with(*BUGS[bug])

    @SEARCH
    @given(soup=soups(tokenizer), chunks=chunkings, apart=st.booleans())
    def search(soup: tuple[list[int], dict[str, Any]], chunks: list[int], apart: bool) -> None:
        check_chunking(tokenizer, module, *soup, chunks, apart)

    with pytest.raises(AssertionError):
        search()


PART_BUGS = {
    "a marker in a string ends the call": (output_parser, "_ if self._scanner.in_string", "_ if False"),
    "newlines around reasoning stay": (output_parser, 'text = text.lstrip("\\n")', "pass"),
    "nested objects are not followed": (tool_call_scanner, "self._depth += 1", "pass"),
}


@pytest.mark.parametrize("bug", PART_BUGS)
def test_planted_bugs_in_the_parts_are_found(bug: str) -> None:
    tokenizer, module = load(BUNDLED), parser_with(*PART_BUGS[bug])

    @SEARCH
    @given(reasoning=st.none() | bodies, content=bodies, made=st.lists(calls(), max_size=3), chunks=chunkings)
    def search(reasoning: str | None, content: str, made: list[tuple[str, str]], chunks: list[int]) -> None:
        check_parts(tokenizer, module, reasoning, content, made, chunks)

    with pytest.raises(AssertionError):
        search()


@settings(max_examples=50, deadline=None)
@given(data=st.data(), chunks=chunkings, apart=st.booleans())
def test_an_unchanged_copy_is_accepted(data: st.DataObject, chunks: list[int], apart: bool) -> None:
    """So what the tests above see fail is the bug, not the copying."""
    tokenizer, module = load(BUNDLED), copy_with(output_parser)
    check_chunking(tokenizer, module, *data.draw(soups(tokenizer)), chunks, apart)
