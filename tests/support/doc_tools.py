"""The scripts beside the chapters as modules, and what the tests of the documents share."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def docs_script(name: str) -> ModuleType:
    """`docs/<name>.py`, loaded under the name `docs_<name>`."""
    spec = spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chapters() -> list[Path]:
    """README and the chapters."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def environment() -> dict[str, str]:
    """For a child process that finds this source tree, whether or not it is installed."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "MODULAR_TELEMETRY_ENABLED": "0"}


def command(name: str) -> str:
    """A console script of the environment that runs the tests."""
    script = Path(sys.executable).parent / name
    assert script.is_file(), f"{script} is missing: install the dev extra"
    return str(script)
