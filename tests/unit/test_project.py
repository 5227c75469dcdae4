"""The project's own promises: sizes, public names, and tasks that run commands that exist."""

import ast
import shlex
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import mili
from mili.cli.main import program

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 300
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PIXI = tomllib.loads((ROOT / "pixi.toml").read_text(encoding="utf-8"))


def test_no_module_is_longer_than_a_sitting():
    sources = [*ROOT.glob("src/mili/**/*.py"), *ROOT.glob("mojo_kernels/**/*.mojo")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    for suffix in (".py", ".mojo"):
        print(f"{sum(n for name, n in lines.items() if name.endswith(suffix))} lines of {suffix}")
    assert len(lines) > 50
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_every_public_name_is_exported_once_and_resolves():
    assert len(set(mili.__all__)) == len(mili.__all__)
    imported_for_types = {
        alias.name
        for node in ast.walk(ast.parse(Path(mili.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mili.")
        for alias in node.names
    }
    assert set(mili.__all__) == imported_for_types | {"__version__"}
    assert all(getattr(mili, name) is not None for name in mili.__all__)


def test_every_exception_is_public():
    errors = vars(import_module("mili.errors")).values()
    tree = {e.__name__ for e in errors if isinstance(e, type) and issubclass(e, mili.MiliError)}
    assert tree <= set(mili.__all__)


def test_the_versions_agree():
    assert PYPROJECT["project"]["version"] == mili.__version__


def test_pixi_has_the_tasks_and_installs_what_pip_does():
    assert {"generate", "chat", "test", "bench", "examples"} <= PIXI["tasks"].keys()
    assert PIXI["pypi-dependencies"]["mili"] == {"path": ".", "editable": True, "extras": ["dev"]}
    assert "dev" in PYPROJECT["project"]["optional-dependencies"]


def check_command(words: list[str]) -> None:
    """Assert that a task's command is a console script of mili with known options, a module or a file."""
    if words[0] == "mili":
        assert "mili" in PYPROJECT["project"]["scripts"]
        command = program.commands[words[1]]
        parent = program.make_context("mili", [], resilient_parsing=True)
        command.make_context(words[1], words[2:], parent=parent)  # parses only; UsageError for an unknown option
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]) is not None, words
    else:
        assert words[0] == "python" and (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("task", PIXI["tasks"])
def test_a_task_is_one_line_of_commands_that_exist(task):
    line = PIXI["tasks"][task]
    assert isinstance(line, str) and "\n" not in line
    for command in line.split("&&"):
        check_command(shlex.split(command))


@pytest.mark.parametrize("line", ["mili gone", "mili generate --gone x", "python gone.py", "python -m gone_module"])
def test_a_command_that_does_not_exist_is_noticed(line):
    with pytest.raises(Exception):  # noqa: B017  (KeyError, UsageError or AssertionError)
        check_command(shlex.split(line))
