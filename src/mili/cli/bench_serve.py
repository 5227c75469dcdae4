"""`mili bench serve`: load a running server and say how it bore it.

Any server with OpenAI's API will do; this knows nothing of mili's. The work is in `mili.cli.serving`; here are the
options and the two ways to load: closed (a fixed number in flight) and open (a fixed rate, whatever is in flight).
"""

import resource
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from mili.cli.options import json_option, length_range, print_json, traceback_option

if TYPE_CHECKING:
    from mili.cli.serving.client import Client, Record

_PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_OBJECTIVES = ("ttft", "tpot", "itl", "e2e", "e2el")  # those of mili.cli.serving.results, which imports NumPy


def _objectives(text: str) -> dict[str, float]:
    """One or several `name:milliseconds`, with spaces or commas between."""
    limits = {}
    for pair in text.replace(",", " ").split():
        name, _, limit = pair.partition(":")
        if name not in _OBJECTIVES:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(_OBJECTIVES)}.")
        try:
            limits[name] = float(limit)
        except ValueError as error:
            raise click.BadParameter(f"{pair!r} is no objective; write for example ttft:200.") from error
    return limits


@click.command()
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--model", help="Name of the model in the API; the first that the server lists when left out.")
@click.option("--endpoint", type=click.Choice(list(_PATHS)), default="completions", show_default=True)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Key to send; OPENAI_API_KEY in the environment does too.")
@click.option("--num-requests", "--num-prompts", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--concurrent", type=click.IntRange(1), help="Closed loop: requests in flight; 50 when left out.")
@click.option("--request-rate", type=click.FloatRange(0, min_open=True), help="Open loop: requests a second, Poisson.")
@click.option(
    "--prompt-len",
    type=length_range,
    metavar="N|LOW:HIGH",
    default="512",
    show_default=True,
    help="Tokens of a prompt.",
)
@click.option(
    "--output-len",
    type=length_range,
    metavar="N|LOW:HIGH",
    default="128",
    show_default=True,
    help="Tokens of an answer.",
)
@click.option(
    "--prefix-len", type=click.IntRange(0), default=0, help="More tokens, before all prompts, in all the same."
)
@click.option(
    "--prompt-kind",
    type=click.Choice(["token-ids", "text"]),
    help="What prompts are; text for chat, where a word counts as a token, and token ids elsewhere.",
)
@click.option("--vocab-size", type=click.IntRange(1), default=256, show_default=True, help="Token ids are below it.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option(
    "--ignore-eos/--no-ignore-eos", default=True, help="Ask for answers of full length, which is the default."
)
@click.option(
    "--goodput",
    type=_objectives,
    metavar="NAME:MS",
    multiple=True,
    help="Limits such as 'ttft:200 itl:50 e2e:5000'; repeatable.",
)
@click.option("--num-warmups", type=click.IntRange(0), default=1, show_default=True, help="Requests before the clock.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=600.0, show_default=True, help="Seconds.")
@click.option("--seed", type=click.IntRange(0), help="Of prompts, lengths and send times; a new one when left out.")
@json_option
@traceback_option
def serve(**options: Any) -> None:
    """Load a running server.

    Closed loop (--concurrent): each request is sent when one before it has ended. Open loop (--request-rate): requests
    are sent at random times whatever the server does, and every latency counts from the time it was due, so that a
    server that falls behind cannot hide it. Tokens are those that the server's usage reports.

    TTFT: time to first token. ITL: time between chunks of output. TPOT: time per token after the first. E2E: to the
    last byte. Goodput: requests a second that kept all limits of --goodput (ms; itl is a request's mean).

    The last line is JSON with the keys of `vllm bench serve`; times in ms.
    """
    if options["concurrent"] is not None and options["request_rate"] is not None:
        raise click.UsageError("--concurrent is a closed loop and --request-rate an open one: give one of them.")
    if options["request_rate"] is None and options["concurrent"] is None:
        options["concurrent"] = 50
    if options["prompt_kind"] is None:
        options["prompt_kind"] = "text" if options["endpoint"] == "chat" else "token-ids"
    if (options["endpoint"], options["prompt_kind"]) == ("chat", "token-ids"):
        raise click.UsageError("--endpoint chat takes --prompt-kind text.")
    if options["seed"] is None:  # a prefix cache would know the prompts of an earlier run with the same seed
        options["seed"] = secrets.randbits(32)
    try:
        import uvloop

        from mili.cli.serving.results import table
    except ModuleNotFoundError as error:
        raise click.ClickException(f'{error.name} is not installed: pip install "mili[serve]"') from error
    _allow_open_files(options["num_requests"])
    result, details = uvloop.run(_run(options))
    if not options["only_json"]:
        click.echo(table(result, details))
    print_json(result)
    if not result["completed"]:
        raise click.exceptions.Exit(1)


async def _run(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The result, and an example of each kind of error."""
    from mili.cli.serving.client import Client
    from mili.cli.serving.results import summarise
    from mili.cli.serving.workload import Lengths, Workload

    key, base_url = options["api_key"], options["base_url"].rstrip("/").removesuffix("/v1")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with Client(base_url, headers, options["timeout"]) as client:
        workload = Workload(
            model=options["model"] or await _first_model(client, base_url),
            prompt_len=Lengths(*options["prompt_len"]),
            output_len=Lengths(*options["output_len"]),
            **{name: options[name] for name in ("endpoint", "prompt_kind", "prefix_len", "vocab_size")},
            **{name: options[name] for name in ("temperature", "ignore_eos")},
        )
        path = _PATHS[workload.endpoint]
        for body in workload.bodies(options["num_warmups"], options["seed"] + 1):
            record = await client.send(path, body)
            if record.error is not None:
                detail = record.detail and f": {record.detail}"
                raise click.ClickException(f"the first request to {base_url}{path} failed: {record.error}{detail}")
        bodies = workload.bodies(options["num_requests"], options["seed"])
        cpu_started = time.process_time()
        started, records = await _load(client, path, bodies, options)
        cpu_seconds = time.process_time() - cpu_started
    duration = max(record.ended for record in records) - started
    objectives = {name: limit for limits in options["goodput"] for name, limit in limits.items()}
    result = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": workload.endpoint,
        "model_id": workload.model,
        "num_prompts": len(bodies),
        "seed": options["seed"],
        "request_rate": options["request_rate"] or "inf",
        "max_concurrency": options["concurrent"],
        "goodput": " ".join(f"{name}:{limit:g}" for name, limit in objectives.items()),
        **summarise(records, duration, objectives),
        "client_utilization": cpu_seconds / duration,
    }
    return result, {record.error: record.detail for record in records if record.error is not None}


async def _load(
    client: "Client", path: str, bodies: Sequence[bytes], options: Mapping[str, Any]
) -> tuple[float, "list[Record]"]:
    """When the load began, and its records."""
    from tqdm import tqdm

    from mili.cli.serving.client import closed_loop, open_loop
    from mili.cli.serving.workload import poisson_times

    with tqdm(total=len(bodies), unit="request", disable=None) as bar:
        started = time.perf_counter()
        if options["request_rate"] is None:
            return started, await closed_loop(client, path, bodies, options["concurrent"], bar.update)
        times = poisson_times(len(bodies), options["request_rate"], options["seed"])
        return started, await open_loop(client, path, bodies, times, bar.update)


async def _first_model(client: "Client", base_url: str) -> str:
    try:
        listed = await client.get("/v1/models")
        name: str = listed["data"][0]["id"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise click.ClickException(
            f"{base_url}/v1/models names no model ({type(error).__name__}: {error}): is the server running? "
            "If it has no such list, give --model"
        ) from error
    return name


def _allow_open_files(num_connections: int) -> None:
    """Lift the soft limit on open files as far as the hard one: an open loop may need a socket for each request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + 64
    if soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
