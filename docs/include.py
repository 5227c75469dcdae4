"""Keep the chapters' quotations of the source code true.

A chapter quotes a region of a file by a comment and the fenced block after it:

    <!-- --8<-- "mojo_kernels/_rms_norm_cpu.mojo:row_cpu" -->

The file marks the region with comments `--8<-- [start:row_cpu]` and `--8<-- [end:row_cpu]`, as pymdownx.snippets does.
The code is written into the chapter, so that a plain Git host shows it.

A table of measurements is quoted from the log in the same way, without a fence; there the region's comments are
`<!-- --8<-- [start:decode_step] -->` and `<!-- --8<-- [end:decode_step] -->`.

    python docs/include.py           # bring every chapter up to date
    python docs/include.py --check   # change nothing; exit 1 and name the chapters that are not

Knows Markdown and marker comments, no other language. Invariant: a quotation without its region is an error, never an
empty block.
"""

import re
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
_QUOTE = re.compile(
    r'<!-- --8<-- "(?P<path>[^":]+):(?P<region>\w+)" -->\n\n?(?P<open>```\w+)\n(?P<code>.*?)^```$', re.M | re.S
)
_TABLE = re.compile(r'<!-- --8<-- "(?P<path>[^":]+\.md):(?P<region>\w+)" -->\n\n(?P<code>(?:\|[^\n]*\n)+)')
_COMMENT = re.compile(r'<!-- --8<-- "')
_MARKER = re.compile(r"^\s*(?:#|<!--) --8<-- \[(start|end):(\w+)\](?: -->)?$")


def chapters() -> list[Path]:
    """The Markdown files of the project, README first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def region(path: str, name: str) -> str:
    """The lines of a marked region, dedented, without the markers of regions inside it.

    Raises ValueError unless the file has exactly one start and one end of that name, in this order.
    """
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    found = [(i, *match.groups()) for i, line in enumerate(lines) if (match := _MARKER.match(line))]
    edges = [(i, kind) for i, kind, marked in found if marked == name]
    if [kind for _, kind in edges] != ["start", "end"]:
        raise ValueError(f"{path} must mark the region {name!r} once with start and end, found {edges}")
    (start, _), (end, _) = edges
    return dedent("\n".join(line for line in lines[start + 1 : end] if not _MARKER.match(line))) + "\n"


def updated(text: str) -> str:
    """`text` with the code of every quotation as the source has it now."""
    quotes = sorted([*_QUOTE.finditer(text), *_TABLE.finditer(text)], key=lambda quote: quote.start())
    if len(quotes) != len(_COMMENT.findall(text)):
        raise ValueError("a --8<-- comment has no fenced block of code, or table, right after it")
    for quote in reversed(quotes):
        start, end = quote.span("code")
        code = region(quote["path"], quote["region"])
        text = text[:start] + (code.strip("\n") + "\n" if quote["path"].endswith(".md") else code) + text[end:]
    return text


def main(arguments: list[str]) -> int:
    """Update the chapters, or with --check only compare; returns the exit status."""
    stale = []
    for chapter in chapters():
        text = chapter.read_text(encoding="utf-8")
        new = updated(text)
        if new != text:
            stale.append(chapter.name)
            if arguments != ["--check"]:
                chapter.write_text(new, encoding="utf-8")
    if stale and arguments == ["--check"]:
        print(f"out of date: {', '.join(stale)}; run python docs/include.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
