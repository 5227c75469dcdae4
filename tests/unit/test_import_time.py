"""What is imported when, counted in modules rather than milliseconds: those do not depend on the machine's mood."""

import json
import subprocess
import sys
from pathlib import Path

import mili

SOURCE = Path(mili.__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """The top-level packages imported by `code` in a fresh interpreter."""
    script = f"{code}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


HEAVY = {"max", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "torch", "transformers"}


def test_import_mili_loads_nothing_heavy():
    assert not modules_after("import mili") & (HEAVY | {"click"})
    assert not modules_after("from mili import SamplingParams, RequestOutput, MiliError") & HEAVY


def test_help_of_every_command_loads_nothing_heavy():
    code = """
from mili.cli.main import main
for words in (["--help"], *([name, "--help"] for name in ("generate", "chat", "run-batch", "plan", "bench", "doctor"))):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, words
"""
    assert not modules_after(code) & HEAVY


def test_planning_on_the_cpu_does_not_load_max():
    code = """
from mili.cli.main import main
try:
    main(["plan", "--device", "cpu"])
except SystemExit as end:
    assert end.code == 0
"""
    assert "max" not in modules_after(code)
