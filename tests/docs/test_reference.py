"""Chapter 9 is what docs/reference.py writes, and that leaves nothing out."""

import dataclasses
import inspect
import re
from collections.abc import Iterator

import click
import pytest

import mili
from mili.cli.main import program
from mili.sampling_params import SamplingParams
from mili.server.protocol import NO_EFFECT, NOT_HONOURED
from mili.server.protocol_chat import ChatRequest
from support.doc_tools import docs_script

script = docs_script("reference")
CHAPTER = script.CHAPTER.read_text(encoding="utf-8")


def section(title: str) -> str:
    """What stands under a heading, up to the next of its level."""
    (marks,) = re.findall(rf"^(#+) {re.escape(title)}$", CHAPTER, re.M)
    return re.split(rf"^#{{1,{len(marks)}}} ", CHAPTER.split(f"\n{marks} {title}\n")[1], flags=re.M)[0]


def test_the_chapter_is_up_to_date(capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().out


def test_every_public_name_is_there():
    for name in set(mili.__all__) - {"__version__"}:
        if issubclass(getattr(mili, name), mili.MiliError):
            assert f"\n- `{name}`: " in section("Exceptions")
        else:
            assert f"[`{name}`](../src/mili/" in section(name)


@pytest.mark.parametrize("cls", [mili.LLM, mili.AsyncLLM])
def test_every_public_method_has_its_signature_and_its_words(cls):
    for name, value in vars(cls).items():
        if not name.startswith("_"):
            text = section(f"{cls.__name__}.{name}")
            assert f"def {name}(" in text
            assert inspect.getdoc(value).splitlines()[0] in text


def test_every_field_of_sampling_params_is_explained():
    for field in dataclasses.fields(SamplingParams):
        assert f"\n- `{field.name}`: " in section("SamplingParams")
        assert f"\n{field.name}: " in section("SamplingParams")


def commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for inner, child in command.commands.items():
            yield from commands(f"{name} {inner}", child)


def test_every_command_shows_its_options():
    found = dict(commands("mili", program))
    assert {"mili generate", "mili bench serve"} <= found.keys()
    for name, command in found.items():
        for option in (option for parameter in command.params for option in parameter.opts if option[0] == "-"):
            assert option in section(name)


def test_every_field_of_a_body_is_listed_or_refused_by_name():
    text = section("ChatRequest")
    for name in ChatRequest.model_fields:
        assert f"\n| `{name}` | " in text
    assert "| `messages` | list of [`Message`](#message), required |" in text
    refused = text.partition("refused by name: ")[2]
    assert all(f"`{name}`" in refused for name in NOT_HONOURED)
    assert "`best_of: 1`" in refused
    assert all(f"`{name}`" in section("HTTP API") for name in NO_EFFECT)


def test_links_inside_the_chapter_lead_to_headings():
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", CHAPTER, re.M)
    }
    targets = set(re.findall(r"\]\(#([^)]+)\)", CHAPTER))
    assert targets
    assert targets <= anchors


def test_nothing_in_it_is_of_one_machine():
    assert not re.search(r"/(home|root|tmp|usr|opt)/|MagicMock|0x[0-9a-f]{6}", CHAPTER)


def test_drift_is_reported_and_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "CHAPTER", tmp_path / "chapter.md")
    monkeypatch.setattr(script, "chapter", lambda: "new\n")
    assert script.main(["--check"]) == 1
    assert capsys.readouterr().out == "out of date: chapter.md; run python docs/reference.py\n"
    assert script.main([]) == 0
    assert (tmp_path / "chapter.md").read_text() == "new\n"
    assert script.main(["--check"]) == 0


def test_sections_of_docstrings_become_lists():
    text = (
        "Do it.\n\nMore ``code``.\n\nArgs:\n    one: First,\n        continued.\n    **two: Second.\n\n"
        "Raises:\n    E: Bad.\n\nEnd."
    )
    assert script._docstring(text) == (
        "Do it.\n\nMore `code`.\n\n**Args**\n\n- `one`: First,\n  continued.\n- `**two`: Second.\n\n"
        "**Raises**\n\n- `E`: Bad.\n\nEnd.\n"
    )


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer", "maximum": 128}, "integer, at most 128"),
        (
            {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            "string or list of string",
        ),
        ({"enum": ["a", "b"]}, '`"a"` or `"b"`'),
        ({"const": "a", "type": "string"}, '`"a"`'),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "object of number"),
        ({"type": "object", "additionalProperties": True}, "object"),
        ({"$ref": "#/$defs/Message"}, "[`Message`](#message)"),
        ({}, "any"),
    ],
)
def test_json_schemas_in_a_few_words(schema, expected):
    assert script._type(schema) == expected
