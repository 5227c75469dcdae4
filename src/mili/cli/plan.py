"""`mili plan`: what a model needs and how much context fits, without loading it."""

import json
from dataclasses import asdict
from typing import Any

import click

from mili.cli.options import MODEL_KEYS, model_options, size, traceback_option


@click.command()
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--device-memory", type=size, metavar="SIZE", help="Plan for a GPU of this size that is not here.")
@click.option("--json", "only_json", is_flag=True, help="Print JSON, with sizes in bytes.")
@model_options
@traceback_option
def plan(name: str | None, device_memory: int | None, only_json: bool, **options: Any) -> None:
    """Show what a model needs and what fits.

    Weights, KV cache per token, and how much context the device has room for.
    Only its JSON files are read (or fetched). MODEL is a folder or a Hugging Face id; the bundled model when left out.
    """
    if name is not None and options["model"] is not None:
        raise click.UsageError("give the model once, as MODEL or with --model.")
    from mili.config import EngineConfig
    from mili.plan import plan_model

    given = {key: options[key] for key in MODEL_KEYS if options[key] is not None}
    model = given.pop("model", name)
    own = {key: given.pop(key) for key in ("revision", "hf_overrides") if key in given}
    if "block_size" in given:
        given["page_size"] = given.pop("block_size")
    memory = None if device_memory is None else (device_memory, device_memory)
    result = plan_model(model, EngineConfig(**given), device_memory=memory, **own)
    if only_json:
        facts = {"model": str(result.folder), "dtype": result.dtype, "device": result.device, **asdict(result.memory)}
        facts |= {key: getattr(result.memory, key) for key in ("kv_bytes", "num_kv_tokens", "max_concurrency")}
        click.echo(json.dumps(facts))
        return
    rows = result.rows()
    width = max(len(what) for what, _ in rows)
    for what, how_much in rows:
        click.echo(f"{what:<{width}}  {how_much}")
