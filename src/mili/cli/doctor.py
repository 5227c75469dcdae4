"""`mili doctor`: what is installed, what the machine has, where things are cached, and whether a token comes out.

Every line is a fact looked up now. The exit code is 0 only when the bundled model made its token.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click

import mili
from mili.cli.options import build_llm, traceback_option

_PACKAGES = ("max", "mojo-compiler", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "click", "tqdm")
_CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)


@click.command()
@click.option("--device", help="Where to make the token: auto, cpu, gpu or gpu:N.")
@click.option("--skip-token", is_flag=True, help="Do not load the bundled model.")
@traceback_option
def doctor(device: str | None, skip_token: bool) -> None:
    """Report versions, devices and caches, and make a token."""
    for name, value in _facts():
        click.echo(f"{name:<16}{value}")
    if skip_token:
        return
    start = time.perf_counter()
    with build_llm({"device": device}) as llm:
        from mili.sampling_params import SamplingParams

        loaded = time.perf_counter()
        output = llm.generate("import numpy as", SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)[0]
        made = time.perf_counter()
        click.echo(
            f"{'token':<16}{output.text!r} on {llm.device} in {llm.dtype}: "
            f"loaded in {loaded - start:.2f} s, made in {made - loaded:.3f} s"
        )


def _facts() -> Iterator[tuple[str, str]]:
    yield "mili", mili.__version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for package in _PACKAGES:
        yield package, _version(package)
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cpu", f"{_cpu_model()}, {_num_cores()} cores usable"
    yield "features", " ".join(_cpu_features()) or "none of those mili looks for"
    yield "memory", _memory()
    yield "gpu", _gpus()
    for name, folder in _cache_folders():
        yield name, f"{folder} ({_size(folder)})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n", 1)[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


def _cpu_features() -> list[str]:
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [feature for feature in _CPU_FEATURES if feature in flags]


def _memory() -> str:
    path = Path("/proc/meminfo")
    if not path.exists():
        return "unknown"
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    return f"{free / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"


def _gpus() -> str:
    try:
        from max.driver import Accelerator, accelerator_count
    except ImportError as error:
        return f"unknown ({error})"
    names = [f"{i}: {Accelerator(i)}" for i in range(accelerator_count())]
    return ", ".join(names) if names else "none"


def _cache_folders() -> Iterator[tuple[str, Path]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from mili.compiler import cache_folder

    yield "compiled", cache_folder()
    yield "hub cache", Path(HF_HUB_CACHE)


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "empty"
    total = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return f"{total / 2**20:,.1f} MiB"
