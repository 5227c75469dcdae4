"""What the chapters quote of the source code is what the source code says."""

import re

import pytest

from support.doc_tools import ROOT, docs_script

include = docs_script("include")
QUOTED = re.compile(r'--8<-- "([^":]+):(\w+)"')
MARKED = re.compile(r"(?:#|<!--) --8<-- \[start:(\w+)\]")


def test_every_quotation_is_up_to_date(capsys):
    assert include.main(["--check"]) == 0, capsys.readouterr().out


def test_every_marked_region_is_quoted():
    quoted = {pair for chapter in include.chapters() for pair in QUOTED.findall(chapter.read_text(encoding="utf-8"))}
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("mojo_kernels/*.mojo"), *ROOT.glob("docs/*.mojo")]
    sources.append(ROOT / "docs" / "LOG.md")
    marked = {
        (str(path.relative_to(ROOT)), name)
        for path in sources
        for name in MARKED.findall(path.read_text(encoding="utf-8"))
    }
    assert marked == quoted


def test_a_stale_quotation_is_replaced_and_nothing_else():
    text = 'before\n\n<!-- --8<-- "docs/rms_norm_ladder.mojo:naive" -->\n```mojo\nold\n```\n\nafter\n'
    new = include.updated(text)
    assert new.startswith("before\n\n<!-- --8<-- ")
    assert new.endswith("```\n\nafter\n")
    assert "def naive(" in new
    assert "old" not in new
    assert "--8<-- [" not in new
    assert include.updated(new) == new


def test_regions_are_dedented_and_lose_the_markers_inside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(include, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        "    # --8<-- [start:outer]\n    if x:\n        # --8<-- [start:inner]\n        y()\n"
        "        # --8<-- [end:inner]\n    # --8<-- [end:outer]\n"
    )
    assert include.region("a.py", "outer") == "if x:\n    y()\n"
    assert include.region("a.py", "inner") == "y()\n"
    with pytest.raises(ValueError, match=r"a\.py must mark the region 'other' once"):
        include.region("a.py", "other")


def test_a_table_is_quoted_without_a_fence(tmp_path, monkeypatch):
    monkeypatch.setattr(include, "ROOT", tmp_path)
    table = "  | a | b |\n  |---|---|\n  | 1 | 2 |\n"
    (tmp_path / "LOG.md").write_text(
        f"- Result:\n\n  <!-- --8<-- [start:one] -->\n\n{table}\n  <!-- --8<-- [end:one] -->\n"
    )
    text = '<!-- --8<-- "LOG.md:one" -->\n\n| old |\n\nafter\n'
    new = include.updated(text)
    assert new == '<!-- --8<-- "LOG.md:one" -->\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nafter\n'
    assert include.updated(new) == new


def test_a_quotation_without_a_block_is_an_error():
    with pytest.raises(ValueError, match="no fenced block"):
        include.updated('<!-- --8<-- "docs/rms_norm_ladder.mojo:naive" -->\n\ntext\n')


def test_check_changes_nothing_and_fails_on_drift(tmp_path, monkeypatch, capsys):
    chapter = tmp_path / "README.md"
    chapter.write_text('<!-- --8<-- "a.py:one" -->\n```python\nold\n```\n')
    (tmp_path / "a.py").write_text("# --8<-- [start:one]\nnew\n# --8<-- [end:one]\n")
    monkeypatch.setattr(include, "ROOT", tmp_path)
    assert include.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    assert "old" in chapter.read_text()
    assert include.main([]) == 0
    assert "new" in chapter.read_text()
    assert include.main(["--check"]) == 0
