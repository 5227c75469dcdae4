"""`mili bench startup`: from the start of a process to its first token.

Each start is a fresh process that imports mili, loads the model and makes one token through the public `LLM`; the clock
runs here, from before the process is made until its line has been read. What the system has kept of the model's files
in memory stays there: a start reads them from disk only when the machine does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import click

from mili.cli.options import MODEL_KEYS, json_option, model_options, print_json, traceback_option

_CACHES = ("MILI_CACHE_DIR", "MODULAR_CACHE_DIR")  # mili's compiled steps; what MAX keeps of its own


@click.command()
@click.option("--cold", is_flag=True, help="With empty caches: everything is compiled.")
@click.option("--prompt-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens of the prompt.")
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Starts; the one of median time counts."
)
@json_option
@model_options
@traceback_option
def startup(cold: bool, prompt_len: int, repeat: int, only_json: bool, **options: Any) -> None:
    """Time from a process's start to its first token.

    The compiled kernels are there, from --compiled or from a start before that is not counted. With --cold each start
    has empty caches in their stead; --compiled leaves nothing to compile and cannot be cold.

    The last line is JSON.
    """
    if cold and options["compiled"] is not None:
        raise click.UsageError("--cold compiles everything and --compiled nothing: give one of them.")
    given = {key: options[key] for key in MODEL_KEYS if options[key] is not None}
    if not cold and options["compiled"] is None:
        start_once(given, prompt_len, cold=False)
    starts = [start_once(given, prompt_len, cold) for _ in range(repeat)]
    median = sorted(starts, key=lambda start: start["startup_s"])[repeat // 2]
    result = {**median, "cold": cold, "prompt_len": prompt_len, "repeat": repeat}
    result["mean_startup_s"] = statistics.mean(start["startup_s"] for start in starts)
    if not only_json:
        click.echo(
            f"{result['model']}, {result['dtype']} on {result['device']}, "
            f"{'nothing compiled' if cold else 'kernels compiled before'}, {repeat} starts\n"
            f"process start to first token {result['startup_s']:.2f} s: import {result['import_s']:.2f} s, "
            f"load {result['load_s']:.2f} s, first token {result['first_token_s']:.3f} s"
        )
    print_json(result)


def start_once(options: Mapping[str, Any], prompt_len: int, cold: bool) -> dict[str, Any]:
    """One process; what it printed, and `startup_s`."""
    command = [sys.executable, "-m", "mili.cli.first_token", json.dumps({**options, "prompt_len": prompt_len})]
    with tempfile.TemporaryDirectory(prefix="mili-start-") as folder, open(f"{folder}/errors", "w+") as errors:
        environment = {**os.environ, **({name: f"{folder}/{name}" for name in _CACHES} if cold else {})}
        start = time.perf_counter()
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            seconds = time.perf_counter() - start
        if not line or process.returncode:
            errors.seek(0)
            reason = errors.read().strip().rpartition("\n")[2]  # the last line of a traceback
            raise click.ClickException(reason or f"the process ended with status {process.returncode}")
    return {**json.loads(line), "startup_s": seconds}
