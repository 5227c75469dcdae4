"""Reading a tokenizer folder, encoding and decoding, chat templates and their errors."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

import mili
from mili.errors import ConfigError, RequestError
from mili.tokenizer import Tokenizer

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
USER = {"role": "user", "content": "hi"}
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled tokenizer files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BUNDLED / name, tmp_path / name)
    return tmp_path


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text(encoding="utf-8")) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def test_importing_mili_does_not_load_it() -> None:
    code = "import sys, mili; sys.exit(bool({'tokenizers', 'jinja2', 'mili.tokenizer'} & sys.modules.keys()))"
    path = str(Path(mili.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


# Reading the folder


def test_facts_of_the_bundled_checkpoint(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 8192
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 8166)
    assert tokenizer.special_ids == frozenset(range(8166, 8180))
    assert tokenizer.is_special(8168)
    assert not tokenizer.is_special(tokenizer.token_to_id("</think>") or 0)
    assert tokenizer.token_to_id("no such token") is None


def test_only_tokenizer_json_is_needed(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_pretrained(str(folder))
    assert tokenizer.encode("def") == [331]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (None, None)
    with pytest.raises(RequestError, match="no default chat template"):
        tokenizer.apply_chat_template([USER])


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0"}', None, "\x00\x01"])
def test_damaged_tokenizer(folder: Path, content: str | None) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:100_000] if content is None else content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a readable tokenizer"):
        Tokenizer.from_pretrained(folder)


def test_a_vocabulary_that_is_not_byte_level(folder: Path) -> None:
    edit(folder / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(ConfigError, match="decoder is Fuse, expected ByteLevel"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"eos_token": 5}', "eos_token must be a string, got 5"),
        ('{"chat_template": [{"name": "default"}]}', "chat_template must be a string or a list"),
        ('{"added_tokens_decoder": {"8166": {}}}', "added_tokens_decoder is malformed"),
        (
            '{"added_tokens_decoder": {"9": {"content": "<|im_end|>", "special": true}}}',
            r"'<\|im_end\|>' is token 9 in tokenizer_config.json but 8168 in tokenizer.json",
        ),
    ],
)
def test_damaged_config(folder: Path, content: str, message: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_pretrained(folder)


def test_added_tokens_of_the_config(folder: Path) -> None:
    """Some checkpoints list tokens, or what they are, in the config only."""
    added = {"8192": {"content": "<new>", "special": False}, "8193": {"content": "<hidden>", "special": True}}
    config: dict[str, Any] = {
        "added_tokens_decoder": added,
        "eos_token": {"content": "</think>", "special": False},
        "extra_special_tokens": ["<tool_call>", {"content": "<extra>"}],
    }
    edit(folder / "tokenizer_config.json", **config)
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("<new><hidden></think><tool_call><extra>def")
    assert ids == [8192, 8193, 8191, 8180, 8194, 331]
    assert [i for i in ids if tokenizer.is_special(i)] == [8193, 8191, 8180, 8194]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<new>def"
    assert tokenizer.eos_token_id == 8191


@pytest.mark.parametrize(
    ("bos", "eos", "ids"),
    [(True, False, [8166, 331]), (False, True, [331, 8167]), (True, True, [8166, 331, 8167]), (False, False, [331])],
)
def test_bos_and_eos_switches(folder: Path, bos: bool, eos: bool, ids: list[int]) -> None:
    config = folder / "tokenizer_config.json"
    edit(config, bos_token="<|endoftext|>", eos_token="<|im_start|>", add_bos_token=bos, add_eos_token=eos)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("def") == ids
    assert tokenizer.encode("def", add_special_tokens=False) == [331]


def test_special_tokens_split_where_the_config_says_so(folder: Path, tokenizer: Tokenizer) -> None:
    edit(folder / "tokenizer_config.json", split_special_tokens=True)
    assert tokenizer.encode("<|im_end|>") == [8168]
    assert len(Tokenizer.from_pretrained(folder).encode("<|im_end|>")) > 1


def test_truncation_and_padding_of_the_file_are_ignored(folder: Path, tokenizer: Tokenizer) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    edit(folder / "tokenizer.json", truncation=truncation, padding=padding)
    text = "import os, sys, json, re"
    assert Tokenizer.from_pretrained(folder).encode(text) == tokenizer.encode(text)


# Text and ids


@pytest.mark.parametrize(("text", "message"), [(5, "must be a str, got int"), ("ab\ud800", "surrogate at character 2")])
def test_bad_text(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer.encode(text)


def test_decode_ids_without_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([331, 8192, 150_000]) == "def"
    with pytest.raises(RequestError, match="between 0 and 2\\*\\*32 - 1, got -1"):
        tokenizer.decode([331, -1])


def test_one_token(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("👋")
    assert rest, "not one token in this vocabulary"
    assert b"".join(map(tokenizer.token_bytes, [first, *rest])) == "👋".encode()
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_text(8168) == "<|im_end|>"
    assert (tokenizer.token_bytes(8192), tokenizer.token_text(8192)) == (b"", "")


def test_added_tokens_are_stored_as_text(folder: Path) -> None:
    """A token with letters outside the byte alphabet is its own UTF-8; one inside it is bytes. As decode does."""
    added = {"8192": {"content": "<名>"}, "8193": {"content": "éé"}, "8194": {"content": "Ġ<x>"}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert [tokenizer.token_bytes(i) for i in (8192, 8193, 8194)] == ["<名>".encode(), b"\xe9\xe9", b" <x>"]
    for token_id in (8192, 8193, 8194):
        assert tokenizer.token_text(token_id) == tokenizer.decode([token_id])


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    fresh = Tokenizer.from_pretrained(BUNDLED)
    texts = [f"def f{i}(x): return {i} * '東京'  <|im_end|>" for i in range(200)]

    def work(text: str) -> tuple[list[int], str, list[bytes], str]:
        ids = fresh.encode(text)
        chat = fresh.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        return ids, fresh.decode(ids), [fresh.token_bytes(i) for i in ids], chat

    with ThreadPoolExecutor(8) as pool:
        for text, (ids, decoded, parts, chat) in zip(texts, pool.map(work, texts), strict=True):
            assert ids == tokenizer.encode(text)
            assert decoded == text == b"".join(parts).decode()
            assert chat == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# Where a chat template comes from


def test_a_template_file_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("file {{ messages[0].content }}", encoding="utf-8")
    extra = folder / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools {{ tools | length }}", encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([USER], tokenize=False) == "file hi"
    assert tokenizer.apply_chat_template([USER], tools=[{}, {}], tokenize=False) == "tools 2"


def test_named_templates_of_the_config(folder: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "rag", "template": "rag {{ documents | length }}"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    tokenizer = Tokenizer.from_pretrained(folder)
    render = tokenizer.apply_chat_template
    assert render([USER], tools=[{}], tokenize=False) == "plain"
    assert render([USER], chat_template="rag", documents=[{"text": "a"}], tokenize=False) == "rag 1"
    assert render([USER], chat_template="given: {{ messages[0].role }}", tokenize=False) == "given: user"


def test_a_template_file_that_is_not_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        Tokenizer.from_pretrained(folder)


# Rendering


def test_chat_ids_are_the_ids_of_its_text(folder: Path) -> None:
    """Also where plain text gets a BOS token: the template writes its own."""
    edit(folder / "tokenizer_config.json", bos_token="<|im_start|>", add_bos_token=True)
    tokenizer = Tokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([USER], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([USER]) == tokenizer.encode(text, add_special_tokens=False)


def test_a_tool_call_without_content(tokenizer: Tokenizer) -> None:
    """OpenAI clients send content null beside tool calls; it renders as no text."""
    for content in ({}, {"content": None}):
        messages: list[dict[str, Any]] = [
            USER,
            {"role": "assistant", "tool_calls": [CALL], **content},
            {"role": "tool", "content": "1"},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert 'assistant\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text


def test_the_messages_are_left_alone(tokenizer: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        USER,
        {"role": "assistant", "content": "so", "reasoning": "hm", "tool_calls": [CALL], "name": None},
    ]
    before = json.dumps(messages)
    tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


class Role(StrEnum):
    USER = "user"


class Pydantic:
    def model_dump(self) -> dict[str, Any]:
        return {"function": {"name": "g", "arguments": "{}"}}


def test_values_become_plain_json(tokenizer: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": Role.USER, "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": (Pydantic(),)},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.startswith("<|im_start|>user\nhi")
    assert '{"name": "g", "arguments": {}}' in text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "messages must be a list .* got str"),
        ({"role": "user", "content": "hi"}, "messages must be a list .* got dict"),
        (None, "messages must be a list .* got NoneType"),
        ([USER, "hi"], r"messages\[1\] must be a dict .* got str"),
        ([USER, {"content": "hi"}], r"messages\[1\] has no 'role'"),
        ([{"role": 3, "content": "hi"}], r"messages\[0\] has no 'role'"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] must be a string or a list of parts, got int"),
        ([{"role": "user", "content": [b"x"]}], r"messages\[0\] holds a bytes"),
        ([{"role": "user", "content": "hi", 5: 6}], r"messages\[0\] has the key 5"),
        ([{"role": "user"}], "the chat template refused these messages: .* no attribute 'content'"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template(messages)


def test_a_message_that_contains_itself(tokenizer: Tokenizer) -> None:
    message: dict[str, Any] = dict(USER)
    message["self"] = message
    with pytest.raises(RequestError, match="contains itself"):
        tokenizer.apply_chat_template([message])


@pytest.mark.parametrize("tools", ["f", [print], [[]], {"name": "f"}])
def test_bad_tools(tokenizer: Tokenizer, tools: Any) -> None:
    with pytest.raises(RequestError, match="tools must be a list of dicts"):
        tokenizer.apply_chat_template([USER], tools=tools)


def test_variables(tokenizer: Tokenizer) -> None:
    template = "{{ eos_token }} {{ style | default('none') }}"
    render = tokenizer.apply_chat_template
    assert render([USER], chat_template=template, tokenize=False) == "<|endoftext|> none"
    assert render([USER], chat_template=template, style="x", eos_token="!", tokenize=False) == "! x"
    with pytest.raises(RequestError, match="a template variable holds a builtin_function_or_method"):
        render([USER], style=print)


@pytest.mark.parametrize(
    ("final", "options", "message"),
    [
        ({"content": "so"}, {"add_generation_prompt": True}, "exclude each other"),
        ({}, {}, "the final message has no 'content' to continue"),
        ({"content": None, "tool_calls": [CALL]}, {}, "the final message has no 'content' to continue"),
        ({"content": []}, {}, "holds no text to continue"),
        ({"content": "so"}, {"continue_final_message": "refusal"}, "has no 'refusal' to continue"),
        ({"refusal": "no"}, {"continue_final_message": "refusal"}, "does not read 'refusal'"),
        ({"content": "so"}, {"chat_template": "content"}, "does not appear in the rendered chat"),
    ],
)
def test_what_cannot_be_continued(
    tokenizer: Tokenizer, final: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    keywords = {"add_generation_prompt": False, "continue_final_message": True} | options
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template([USER, {"role": "assistant", **final}], **keywords)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ (strftime_now | attr('__globals__')) }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ range(10 ** 9) | length }}",
    ],
)
def test_the_sandbox_holds(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        tokenizer.apply_chat_template([USER], chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "not valid Jinja"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{{ no_such_function() }}", "'no_such_function' is undefined"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[9].role }}", "has no element 9"),
        ("{{ raise_exception('only one system message') }}", "refused these messages: only one system message"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "not valid Jinja"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_templates(tokenizer: Tokenizer, template: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer.apply_chat_template([USER], chat_template=template)
