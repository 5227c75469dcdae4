"""Chapter 8 has every message that mili raises on purpose, and no other."""

import re
from pathlib import Path

import pytest

from support.doc_tools import docs_script

script = docs_script("messages")
CHAPTER = script.CHAPTER.read_text(encoding="utf-8")


def test_every_message_has_an_entry_and_every_entry_a_message(capsys):
    assert script.main() == 0, capsys.readouterr().out


def test_the_code_tells_more_than_a_few_messages():
    found = script.messages()
    assert len(found) > 200
    assert found["port must be 0 to 65535, got …"].startswith("server/config.py:")


def test_every_cause_and_remedy_is_a_sentence():
    for message, (cause, remedy) in script.entries(CHAPTER).items():
        for text in (cause, remedy.removeprefix("→ ")):
            assert len(text) > 5 and text.endswith("."), message


def test_every_code_is_explained():
    in_table = re.findall(r"^\| (`\w+`.*?) \|", CHAPTER, re.M)
    of_batches = re.findall(r"\((`\w+`(?:, `\w+`)*)\)\.\\$", CHAPTER, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(in_table + of_batches))) == script.codes()


def test_what_the_chapters_program_prints_is_found_in_it():
    (output,) = re.findall(r"^```output\n(.*?)^```$", CHAPTER, re.M | re.S)
    printed = re.findall(r"^\w+Error: (.*)$", output, re.M)
    assert len(printed) == 3
    for message in printed:
        templates = [re.escape(template).replace(script.VARIES, ".+") for template in script.entries(CHAPTER)]
        assert any(re.fullmatch(template, message) for template in templates), message


def source(tmp_path: Path, text: str, name: str = "module.py") -> Path:
    (tmp_path / "errors.py").write_text("class MiliError(Exception): ...\nclass SomeError(MiliError): ...\n")
    (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise SomeError('plain')", ["plain"]),
        ("raise SomeError(f'{a}: {b!r} is {c:d} and {d} {e}')", ["…: … is … and …"]),
        ("raise SomeError('two '\n 'lines')", ["two lines"]),
        ("return SomeError('made here, raised there')", ["made here, raised there"]),
        ("raise SomeError(str(error)) from error", []),
        ("raise OtherError('not ours')", []),
        ("raise SomeError('one' if a else f'other {b}')", ["one", "other …"]),
        ("m = 'by name'\nraise SomeError(m)", ["by name"]),
        ("m = f'part {a}'\nraise SomeError(f'{m} of it')", ["part … of it"]),
        ("m = f'has {a}' if a else ''\nraise SomeError(f'it {m}!')", ["it has …!", "it !"]),
        ("raise ApiError(400, f'second {a}', param='n')", ["second …"]),
        ("raise PydanticCustomError('kind', '{problem} type', {})", ["… type"]),
    ],
)
def test_templates_are_read_from_the_source(tmp_path, text, expected):
    body = "\n".join(f"    {line}" for line in text.splitlines())
    assert list(script.messages(source(tmp_path, f"def f():\n{body}\n"))) == expected


def test_helpers_are_followed_to_their_callers_and_to_what_they_return(tmp_path):
    text = (
        "def refuse(status, message): return ApiError(status, message)\n"
        "class A:\n    def end(self, text): raise SomeError(text)\n"
        "    def f(self): self.end('from a method'); refuse(400, f'given {x}'); raise SomeError(explain(x))\n"
        "def explain(x):\n    if x: return 'one'\n    return f'two {x}'\n"
    )
    assert set(script.messages(source(tmp_path, text))) == {"given …", "from a method", "one", "two …"}


def test_of_one_message_the_most_general_form_counts(tmp_path):
    text = "def f():\n    more = f' and {a}' if a else ''\n    raise SomeError(f'{b}{more}: wrong')\n"
    assert list(script.messages(source(tmp_path, text))) == ["…: wrong"]


def test_value_errors_count_where_bodies_are_declared(tmp_path):
    text = "def f(value): raise ValueError('must be a list')\n"
    assert list(script.messages(source(tmp_path, text))) == []
    assert list(script.messages(source(tmp_path, text, "protocol_chat.py"))) == ["must be a list"]


def test_codes_are_found_through_helpers(tmp_path):
    text = "def no(code): return ApiError(503, 'm', code=code)\nno('busy')\nBadLine(i, 'torn', 'm')\n"
    assert script.codes(source(tmp_path, text)) == {"busy", "torn"}


def test_entries_are_read_from_the_chapter():
    one = "- `a …`\\\n  ``b `c` ``\\\n  Cause,\n  on two lines.\\\n  → Remedy.\n"
    other = "- `d`\\\n  `x` is wrong.\\\n  → Do.\n\n- **no entry**\n"
    expected = ("Cause, on two lines.", "→ Remedy.")
    last = ("`x` is wrong.", "→ Do.")
    assert script.entries(f"text\n\n{one}{other}") == {"a …": expected, "b `c`": expected, "d": last}


@pytest.mark.parametrize("entry", ["- `a`\\\n  Cause.", "- `a`\\\n  → Remedy.", "- `a`\\\n  `b`\\\n  → Remedy."])
def test_an_entry_without_cause_or_remedy_is_an_error(entry):
    with pytest.raises(ValueError, match="an entry needs its messages"):
        script.entries(entry)


def test_an_entry_that_is_there_twice_is_an_error():
    with pytest.raises(ValueError, match="there already: `a`"):
        script.entries("- `a`\\\n  Cause.\\\n  → Remedy.\n- `a`\\\n  Cause.\\\n  → Remedy.\n")


def test_drift_is_reported(tmp_path, monkeypatch, capsys):
    (tmp_path / "chapter.md").write_text("- `old`\\\n  Cause.\\\n  → Remedy.\n")
    monkeypatch.setattr(script, "CHAPTER", tmp_path / "chapter.md")
    monkeypatch.setattr(script, "messages", lambda: {"new": "module.py:3"})
    assert script.main() == 1
    assert capsys.readouterr().out == "no entry (module.py:3): new\nno such message: old\n"
