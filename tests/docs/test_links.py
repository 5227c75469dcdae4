"""Links in README and the chapters lead somewhere, and a link named for a symbol leads to a file that has it."""

import re
import shlex

import pytest

from mili.cli.main import program
from support.doc_tools import ROOT, chapters

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#]+)(?P<anchor>#[^)]*)?\)")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
SYMBOL = re.compile(r"`(?:\w+\.)?(\w+)`")


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_links_lead_to_files_and_symbols(chapter):
    for link in LINK.finditer(FENCED.sub("", chapter.read_text(encoding="utf-8"))):
        if link["target"].startswith("https://"):
            continue
        target = (chapter.parent / link["target"]).resolve()
        assert target.exists(), link[0]
        symbol = SYMBOL.fullmatch(link["text"])
        if symbol and target.is_file() and symbol[1] != target.suffix.removeprefix("."):
            defined = rf"^\s*(def|class|struct) {symbol[1]}\b|^{symbol[1]}(: \w+)? = "
            assert re.search(defined, target.read_text(encoding="utf-8"), re.M), link[0]


def test_every_chapter_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in ROOT.glob("docs/*.md")} == set(re.findall(r"\(docs/(\w+\.md)\)", text))


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.name)
def test_commands_exist(chapter):
    text = chapter.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    for part in (part for line in lines for part in line.split("&&")):
        words = shlex.split(part)
        if words[0].endswith("mili"):
            known = {option for parameter in program.commands[words[1]].params for option in parameter.opts}
            assert {word for word in words[2:] if word.startswith("-")} <= known, part
        for word in words:
            if word.endswith((".py", ".mojo")):
                assert (ROOT / word).is_file(), part
