"""The promises of README that are not links or programs."""

import re

from support.doc_tools import ROOT, docs_script

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_are_exactly_two_lines_to_set_up_and_go():
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 2
    assert all(line.startswith("python3 -m venv .venv && .venv/bin/pip install ") for line in lines)
    assert ".venv/bin/mili generate" in lines[0]
    assert lines[1].endswith("&& .venv/bin/python -m pytest")


def test_the_example_has_at_most_ten_lines():
    (example,) = docs_script("run").programs(README)
    assert 5 <= len(example.code.strip().splitlines()) <= 10


def test_no_numbers_of_speed_outside_the_log():
    """Chapters 4 and 7 quote tables (test_includes.py); a number in their prose stands in the log, with its unit."""
    log = " ".join((ROOT / "docs" / "LOG.md").read_text(encoding="utf-8").split())
    for path in (ROOT / "README.md", *ROOT.glob("docs/0*.md")):
        text = path.read_text(encoding="utf-8")
        if path.name in ("04_attention.md", "07_advanced_optimisation.md"):
            prose = re.sub(r"^```.*?^```$|^\|.*?$", "", text, flags=re.M | re.S)
            found = re.findall(r"\d[\d,.]*\s(?:tok/s|[GT]B/s|TFLOP/s|[mu]s\b)", prose)
            numbers = {" ".join(number.split()) for number in found}
            assert not {n for n in numbers if not re.search(rf"(?<![\d.,]){re.escape(n)}", log)}, path.name
        else:
            assert not re.search(r"\d ?(tok/s|tokens/s|GB/s|TFLOP/s|ms\b)", text), path.name


def test_the_log_has_dated_entries():
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    entries = re.split(r"^## ", log, flags=re.M)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"\d{4}-\d\d-\d\d: \S", entry), entry.splitlines()[0]
        for field in ("Machine:", "Command:", "Result:", "Conclusion:"):
            assert f"- {field}" in entry, f"{field} is missing under {entry.splitlines()[0]!r}"
