"""`mili serve`: the OpenAI-compatible server."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mili.cli.options import MODEL_KEYS, Command, model_options, size, traceback_option
from mili.server.config import ServerConfig, read_keys


def _option(name: str, help: str, **more: Any) -> Callable[[Command], Command]:
    """An option for a field of `ServerConfig`, with its default."""
    field = name.removeprefix("--").replace("-", "_")
    default = getattr(ServerConfig(), field)
    return click.option(name, default=str(default) if "type" in more else default, show_default=True, help=help, **more)


@click.command()
@click.argument("name", metavar="[MODEL]", required=False)
@_option("--host", "Address to listen on; 0.0.0.0 for all of this machine's.")
@_option("--port", "Port to listen on; 0 lets the system choose.")
@click.option("--served-model-name", help="The model's name in the API; the checkpoint's own when left out.")
@click.option("--api-key", "api_keys", multiple=True, help="Ask clients for this key; may be given several times.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file with keys, one a line. $MILI_API_KEY may hold keys as well.",
)
@click.option("--allowed-origins", multiple=True, help="Let pages of this origin call the API; repeatable, * for all.")
@_option("--max-queue", "Completions that may wait before requests are refused with 429.")
@click.option(
    "--max-event-rate",
    type=float,
    help="Most events a second over all streams; tokens in between come together. 500 on a CPU and 4000 with a GPU "
    "when left out; inf for an event for each token.",
)
@_option("--max-body-bytes", "Largest request body.", type=size, metavar="SIZE")
@_option("--read-timeout", "Seconds for a request's headers, and again for its body, to arrive.")
@_option("--write-timeout", "Seconds for a client to take what was sent.")
@_option("--keep-alive", "Seconds that an unused connection stays open.")
@_option("--drain-timeout", "Seconds after SIGTERM for running requests to finish.")
@_option("--stall-timeout", "Seconds without a finished step until /ready says 503.")
@_option("--log-format", "text or json lines on stderr.", type=click.Choice(["text", "json"]))
@click.option("--access-log/--no-access-log", default=True, show_default=True, help="Log every request.")
@_option("--metrics-prefix", "Prefix of the names at /metrics, before a colon.")
@click.option("--reasoning-content", is_flag=True, help="Also write the reasoning as `reasoning_content`.")
@click.option("--tracing", is_flag=True, help="Send OpenTelemetry spans to $OTEL_EXPORTER_OTLP_ENDPOINT.")
@model_options
@traceback_option
def serve(name: str | None, api_keys: tuple[str, ...], api_key_file: Path | None, **options: Any) -> int:
    """Serve MODEL over HTTP, with OpenAI's API.

    MODEL is a folder or a Hugging Face id; the bundled model when left out. SIGTERM ends the server after the requests
    it has accepted. Metrics for Prometheus are at /metrics, probes at /health and /ready, a web page at /.
    """
    if name is not None and options["model"] is not None:
        raise click.UsageError("give the model once, as MODEL or with --model.")
    given = {key: options.pop(key) for key in MODEL_KEYS}
    engine = {key: value for key, value in given.items() if value is not None}
    model = engine.pop("model", name)
    from_file = () if api_key_file is None else read_keys(api_key_file)
    config = ServerConfig(api_keys=(*api_keys, *from_file, *os.environ.get("MILI_API_KEY", "").split()), **options)
    try:
        from mili.server.lifecycle import serve
    except ModuleNotFoundError as error:
        raise click.ClickException(f'{error.name} is not installed: pip install "mili[serve]"') from error
    return serve(config, model, engine)
