"""The examples run as a user runs them, and the notebook as Jupyter runs it."""

import asyncio
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from support.doc_tools import ROOT, environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_the_examples_are_these():
    assert [path.stem for path in EXAMPLES] == ["01_generate", "02_stream", "03_chat", "04_batch"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(example: Path, tmp_path: Path):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 40
    result = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 4
    said = {"01_generate": "finished by", "02_stream": "first token after", "03_chat": "32 of 103", "04_batch": "tok/s"}
    assert said[example.stem] in result.stdout


def test_an_example_takes_another_model(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, EXAMPLES[0], str(tmp_path)], capture_output=True, text=True, env=environment(), timeout=600
    )
    assert result.returncode != 0
    assert str(tmp_path) in result.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    path = ROOT / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "the notebook is kept without outputs: clear them"
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": ROOT}})
    asyncio.run(client.async_execute())
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]
    assert all(printed[:-1]), "a cell printed nothing"
    assert "32 of" in printed[5]
