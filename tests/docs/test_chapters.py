"""The Python in README and the chapters runs, and prints what it is said to print."""

import re
import subprocess

import pytest

from support.doc_tools import ROOT, chapters, command, docs_script, environment

run = docs_script("run")
WITH_PYTHON = [path for path in chapters() if run.programs(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("chapter", WITH_PYTHON, ids=lambda path: path.name)
def test_a_chapter_prints_what_it_says(chapter):
    for program, output in run.printed(chapter):
        if program.output is not None:
            assert output == program.output, (
                f"{chapter.name}:{program.line}; python docs/run.py --update {chapter.name}"
            )


def test_the_chapters_with_programs_are_these():
    names = ["README.md", "01_overview.md", "02_kernel_guide.md", "03_python_integration.md", "04_attention.md"]
    names += ["05_kv_cache.md", "06_deployment.md", "07_advanced_optimisation.md", "08_troubleshooting.md"]
    names += ["10_best_practices.md"]
    assert [path.name for path in WITH_PYTHON] == names


def test_every_chapter_ends_as_it_should():
    for chapter in ROOT.glob("docs/0*.md"):
        if chapter.name == "09_api_reference.md":
            continue  # written by a program, to look things up in rather than to read
        headings = re.findall(r"^## (.*)$", chapter.read_text(encoding="utf-8"), re.M)
        assert headings[0] == "Start from a running program"
        assert headings[-2:] == ["Where this lives in the code", "What you can break to see it fail"]


def test_blocks_share_a_namespace_and_quotations_do_not_run(tmp_path, capsys):
    chapter = tmp_path / "chapter.md"
    said = '```python\nx = 1\n```\n\n<!-- --8<-- "a:b" -->\n```python\nraise\n```\n\n```python\nprint(x)\n```\n\n'
    chapter.write_text(f"{said}```output\n2\n```\n")
    assert run.main([str(chapter)]) == 1
    assert capsys.readouterr().out == f"{chapter}:11: said\n2\nprinted\n1\n\n"
    assert run.main(["--update", str(chapter)]) == 0
    assert chapter.read_text() == f"{said}```output\n1\n```\n"
    assert run.main([str(chapter)]) == 0


def test_an_exception_names_the_line_of_the_chapter(tmp_path):
    chapter = tmp_path / "chapter.md"
    chapter.write_text("text\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        list(run.printed(chapter))
    assert caught.traceback[-1].lineno + 1 == 5


def run_ladder(folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command("mojo"), "run", "-I", str(ROOT), str(folder / "rms_norm_ladder.mojo")],
        capture_output=True,
        text=True,
        env=environment(),
    )


def test_the_ladder_of_chapter_2_climbs():
    result = run_ladder(ROOT / "docs")
    assert result.returncode == 0, result.stderr
    assert [line[:3] for line in result.stdout.splitlines()] == ["1 n", "2 f", "3 v", "4 p"]


def test_the_ladder_sees_a_planted_bug(tmp_path):
    source = (ROOT / "docs" / "rms_norm_ladder.mojo").read_text(encoding="utf-8")
    good, bad = "squares += sum.cast[F32]() * sum.cast[F32]()", "squares += sum.cast[F32]()"
    assert source.count(good) == 1
    (tmp_path / "rms_norm_ladder.mojo").write_text(source.replace(good, bad))
    result = run_ladder(tmp_path)
    assert result.returncode != 0
    assert "2 fused      is wrong at row 0" in result.stdout + result.stderr
