"""Run the chapters' Python blocks and compare what they print with what the chapter says they print.

The ```python blocks of a chapter are one program, run from top to bottom. A block that is followed by an ```output
block prints exactly that. Blocks that quote a file (see include.py) are not run.

    python docs/run.py docs/05_kv_cache.md             # run a chapter; exit 1 at the first difference
    python docs/run.py --update docs/05_kv_cache.md    # write what was printed into the output blocks

Knows Markdown and Python, not mili. Invariant: an exception in a block is an error of the chapter, at its line.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = re.compile(
    r"(?P<quoted>^<!-- --8<-- [^\n]*\n\n?)?^```python\n(?P<code>.*?)^```\n(?:\n?```output\n(?P<output>.*?)^```$)?",
    re.M | re.S,
)


@dataclass(frozen=True, slots=True)
class Program:
    """One block of Python in a chapter."""

    line: int  # of its first line of code, from 1
    code: str
    output: str | None  # what it is said to print; None if the chapter does not say
    span: tuple[int, int]  # of `output` in the chapter's text


def programs(text: str) -> list[Program]:
    """The blocks of a chapter that run, in order."""
    return [
        Program(text.count("\n", 0, m.start("code")) + 1, m["code"], m["output"], m.span("output"))
        for m in _PROGRAM.finditer(text)
        if m["quoted"] is None
    ]


def printed(chapter: Path) -> Iterator[tuple[Program, str]]:
    """Run a chapter's blocks in one namespace and yield each with what it printed."""
    namespace = {"__name__": "__main__"}
    for program in programs(chapter.read_text(encoding="utf-8")):
        code = compile("\n" * (program.line - 1) + program.code, str(chapter), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, namespace)
        yield program, out.getvalue()


def main(arguments: list[str]) -> int:
    """Run the chapters named on the command line; returns the exit status."""
    update = "--update" in arguments
    for chapter in (Path(argument) for argument in arguments if argument != "--update"):
        text = chapter.read_text(encoding="utf-8")
        results = list(printed(chapter))
        for program, output in reversed(results):
            if program.output is not None and update:
                text = text[: program.span[0]] + output + text[program.span[1] :]
            elif program.output not in (None, output):
                print(f"{chapter}:{program.line}: said\n{program.output}printed\n{output}")
                return 1
        if update:
            chapter.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
