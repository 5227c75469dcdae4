"""`mili compile`: compile a model's kernels here, to start elsewhere without compiling."""

import os
import sys
from pathlib import Path

import click

from mili.cli.options import json_object, show_progress, traceback_option


@click.command("compile")
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--target", default="cpu", show_default=True, help="cpu (this machine's) or a GPU such as sm_90a.")
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR")
@click.option("--dtype", default="auto", show_default=True, help="auto, bfloat16 or float32.")
@click.option("--block-size", type=int, default=16, show_default=True, help="Tokens per KV-cache page.")
@click.option("--batch-invariant", is_flag=True, help="For `--batch-invariant`; changes nothing for the CPU.")
@click.option("--hf-overrides", type=json_object, metavar="JSON", help="JSON merged over config.json.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@traceback_option
def compile_command(
    name: str | None,
    target: str,
    output: Path,
    dtype: str,
    block_size: int,
    batch_invariant: bool,
    hf_overrides: dict[str, object] | None,
    revision: str | None,
) -> None:
    """Compile MODEL's kernels into DIR, for `--compiled DIR` on a machine like the target.

    Needs neither the weights nor the GPU. MODEL is a folder or a Hugging Face id; the bundled model when left out.
    """
    show_progress()
    from mili.ahead_of_time import compile_ahead
    from mili.config import EngineConfig

    config = EngineConfig(dtype=dtype, page_size=block_size, batch_invariant=batch_invariant)
    path = compile_ahead(name, output, target, config, hf_overrides=hf_overrides, revision=revision)
    click.echo(path)
    if target != "cpu":  # taking a virtual device down again is of no use and may fail
        sys.stdout.flush()
        os._exit(0)
