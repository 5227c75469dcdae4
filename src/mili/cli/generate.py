"""`mili generate`: complete one text, written to the terminal as it is made."""

import sys
from pathlib import Path
from typing import Any

import click

from mili.cli.options import build_llm, build_sampling_params, model_options, sampling_options, traceback_option


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", type=click.Path(path_type=Path, allow_dash=True), help="Read the prompt from a file.")
@model_options
@sampling_options
@click.option("--echo", is_flag=True, help="Write the prompt before its completion.")
@click.option("--stats", is_flag=True, help="Write counts and speed to stderr at the end.")
@traceback_option
def generate(prompt: str | None, file: Path | None, echo: bool, stats: bool, **options: Any) -> None:
    """Continue a text.

    PROMPT is an argument, a file or standard input, and is not wrapped in a chat format. At most 256 tokens are
    made unless --max-tokens says otherwise.
    """
    text = _read_prompt(prompt, file)
    options["max_tokens"] = 256 if options["max_tokens"] is None else options["max_tokens"]
    with build_llm(options) as llm:
        params = build_sampling_params(llm, options)
        if echo:
            click.echo(text, nl=False)
        last = None
        for last in llm.stream(text, params):
            click.echo(last.delta, nl=False)
        click.echo()
    if stats and last is not None:
        click.echo(_summary(last), err=True)


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise click.UsageError("give either PROMPT or --file, not both.")
    if prompt is not None:
        return prompt
    if file is not None and str(file) != "-":
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    if sys.stdin is None or (file is None and sys.stdin.isatty()):  # None: closed by whoever started this process
        raise click.UsageError("no prompt: give it as an argument, with --file, or on standard input.")
    return sys.stdin.read()


def _summary(output: Any) -> str:
    completion, metrics = output.outputs[0], output.metrics
    decode_seconds = metrics.finished_time - metrics.first_token_time
    num_tokens = len(completion.token_ids)
    speed = f"{(num_tokens - 1) / decode_seconds:.1f} tok/s" if num_tokens > 1 and decode_seconds > 0 else "-"
    return (
        f"{len(output.prompt_token_ids)} prompt tokens, {num_tokens} new, first after "
        f"{metrics.time_to_first_token:.3f} s, then {speed}; finished by {completion.finish_reason}"
    )
