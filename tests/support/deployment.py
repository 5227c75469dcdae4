"""The files under deployment/ as data: a Dockerfile's instructions, YAML documents, and rendered kustomizations."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mili.cli.main import program

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deployment" / "docker"
KUBERNETES = ROOT / "deployment" / "kubernetes"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "mili.json"


def stages(dockerfile: Path) -> dict[str, dict[str, list[str]]]:
    """Stage name to instruction to its arguments, with what a stage inherits from an earlier one before its own."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.M)
    result: dict[str, dict[str, list[str]]] = {"": {}}
    name = ""
    for line in filter(str.strip, re.sub(r"\\\n\s*", "", text).splitlines()):
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, name = arguments.split(" AS ")
            result[name] = {key: list(values) for key, values in result.get(base, {}).items()}
        result[name].setdefault(instruction, []).append(arguments)
    return result


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def rendered(folder: Path) -> dict[str, dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, by kind; skips the test where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed: kustomizations are not rendered")
    result = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    manifests = list(yaml.safe_load_all(result.stdout))
    assert len({manifest["kind"] for manifest in manifests}) == len(manifests), "two manifests of one kind"
    return {manifest["kind"]: manifest for manifest in manifests}


def option(arguments: Sequence[str], name: str) -> str:
    """The value of `--name=value` or `--name value` on a command line."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    return words[words.index(f"--{name}") + 1]


def parse_serve(arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `mili serve ARGUMENTS`; raises click.UsageError for what it does not take."""
    with click.Context(program, info_name="mili", **program.context_settings) as parent:
        return program.commands["serve"].make_context("serve", list(arguments), parent=parent).params
