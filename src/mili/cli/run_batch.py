"""`mili run-batch`: answer a file of requests in OpenAI's batch form, without a server.

It loads the model only when something is left to do. Whatever ends it, Ctrl-C, `kill` or a full disk, the same command
goes on where it stopped.
"""

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mili.cli.options import MODEL_KEYS, model_options, traceback_option

if TYPE_CHECKING:
    from mili.async_llm import AsyncLLM
    from mili.batch_file import BatchOutput
    from mili.run_batch import BatchSummary

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("run-batch")
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("-i", "--input-file", "input_path", type=_FILE, required=True, help="JSON lines to answer.")
@click.option("-o", "--output-file", "output_path", type=_FILE, required=True, help="Where the answers go.")
@click.option("--served-model-name", help="What the lines call the model; by default as `mili serve` would.")
@model_options
@traceback_option
def run_batch(
    name: str | None, input_path: Path, output_path: Path, served_model_name: str | None, **options: Any
) -> None:
    """Answer a file of requests.

    Each line is one request as OpenAI's batch files have it: custom_id, method, url (/v1/chat/completions or
    /v1/completions) and body. The answers come in the same order; a request that fails becomes a line that says why,
    and the others go on. An output file that has answers already is gone on with, not begun again.
    """
    if name is not None and options["model"] is not None:
        raise click.UsageError("give the model once, as MODEL or with --model.")
    options["model"] = options["model"] or name
    from mili.batch_file import BatchOutput

    with BatchOutput(input_path, output_path) as output:
        num_before = output.num_done
        if num_before == output.num_lines:
            click.echo(f"{output_path} has all {num_before} lines already", err=True)
            return
        started = time.perf_counter()
        try:
            summary = _answer(input_path, output, served_model_name, options)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on from here", err=True)
            raise
    click.echo(_report(summary, num_before, time.perf_counter() - started), err=True)


def _answer(input_path: Path, output: "BatchOutput", served_model_name: str | None, options: Any) -> "BatchSummary":
    from tqdm import tqdm

    from mili.batch_file import read_batch
    from mili.run_batch import run_batch as run
    from mili.server.app import create_app
    from mili.server.config import ServerConfig

    async def answer_all(llm: "AsyncLLM") -> "BatchSummary":
        app = create_app(llm, ServerConfig(served_model_name=served_model_name, access_log=False))
        lines = itertools.islice(read_batch(input_path), output.num_done, None)
        with tqdm(total=output.num_lines, initial=output.num_done, unit="line", disable=None) as bar:
            return await run(
                *(app, lines, output.write),
                max_in_flight=2 * llm.max_num_seqs,  # so that whoever finishes has a successor waiting
                check_health=llm.check_health,
                on_written=bar.update,
            )

    llm = _build_llm(options)
    try:
        return asyncio.run(answer_all(llm))
    finally:
        llm.close()


def _build_llm(options: Mapping[str, Any]) -> "AsyncLLM":
    from mili.async_llm import AsyncLLM

    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mili").setLevel(logging.INFO)  # says why the first start takes its time
    return AsyncLLM(**{key: options[key] for key in MODEL_KEYS if options.get(key) is not None})


def _report(summary: "BatchSummary", num_before: int, seconds: float) -> str:
    num_new = summary.num_succeeded + summary.num_failed
    text = f"{num_new} lines in {seconds:.1f} s: {summary.num_succeeded} succeeded, {summary.num_failed} failed"
    if num_before:
        text += f", after {num_before} of an earlier run"
    tokens = f"{summary.prompt_tokens:,} prompt + {summary.completion_tokens:,} completion tokens"
    return f"{text}; {tokens}, {summary.completion_tokens / seconds:,.1f} tok/s"
