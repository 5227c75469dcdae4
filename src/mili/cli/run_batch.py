"""`mili run-batch`: answer a file of requests in OpenAI's batch form, without a server.

It loads the model only when something is left to do. Whatever ends it, Ctrl-C, `kill` or a full disk, the same command
goes on where it stopped.
"""

import asyncio
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mili.cli.options import MODEL_KEYS, model_options, show_progress, traceback_option
from mili.server.config import ServerConfig

if TYPE_CHECKING:
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
        try:
            config = ServerConfig(served_model_name=served_model_name, access_log=False)
            summary, seconds = _answer(input_path, output, config, options)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on from here", err=True)
            raise
    click.echo(_report(summary, seconds, num_before), err=True)


def _answer(
    input_path: Path, output: "BatchOutput", config: ServerConfig, options: Mapping[str, Any]
) -> "tuple[BatchSummary, float]":
    """Load the model and answer the rest of the lines; what became of them, and the seconds without the load."""
    from tqdm import tqdm

    from mili.batch_file import read_batch

    try:
        from mili.run_batch import run_batch as run
        from mili.server.app import create_app
    except ModuleNotFoundError as error:
        raise click.ClickException(f'{error.name} is not installed: pip install "mili[serve]"') from error
    from mili.async_llm import AsyncLLM

    async def answer_all(llm: AsyncLLM) -> "BatchSummary":
        lines = itertools.islice(read_batch(input_path), output.num_done, None)
        with tqdm(total=output.num_lines, initial=output.num_done, unit="line", disable=None) as bar:
            return await run(
                *(create_app(llm, config), lines, output.write),
                max_in_flight=2 * llm.max_num_seqs,  # so that whoever finishes has a successor waiting
                check_health=llm.check_health,
                on_written=bar.update,
            )

    show_progress()
    llm = AsyncLLM(**{key: options[key] for key in MODEL_KEYS if options.get(key) is not None})
    started = time.perf_counter()
    try:
        return asyncio.run(answer_all(llm)), time.perf_counter() - started
    finally:
        llm.close()


def _report(summary: "BatchSummary", seconds: float, num_before: int) -> str:
    num_new = summary.num_succeeded + summary.num_failed
    text = f"{num_new} lines in {seconds:.1f} s: {summary.num_succeeded} succeeded, {summary.num_failed} failed"
    if num_before:
        text += f", after {num_before} of an earlier run"
    tokens = f"{summary.prompt_tokens:,} prompt + {summary.completion_tokens:,} completion tokens"
    return f"{text}; {tokens}, {summary.completion_tokens / seconds:,.1f} tok/s"
