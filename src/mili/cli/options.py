"""Options that several commands share, and how they become an `LLM` and a `SamplingParams`.

It does not know the defaults: an option left out is None and is not passed on, so `LLM` and the model's
generation_config.json keep the last word. Every name is that of the Python argument, with dashes.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mili.llm import LLM
    from mili.sampling_params import SamplingParams

Command = TypeVar("Command", bound=Callable[..., Any])


def size(text: str) -> int:
    """Bytes from `1073741824`, `1GiB`, `1.5GB` or `512MiB`; a usage error for anything else."""
    units = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    number, factor = text.strip().upper(), 1
    for unit, unit_bytes in units.items():
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), unit_bytes
            break
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r} is not a size; write for example 2GiB or 512MiB.") from error


def json_object(text: str) -> dict[str, Any]:
    """A JSON object as a dict; a usage error for anything else."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise click.BadParameter(f"{text!r} is not a JSON object.")
    return value


def length_range(text: str) -> tuple[int, int]:
    """`512`, or `100:1000` for any length between."""
    low, _, high = text.partition(":")
    try:
        lengths = int(low), int(high or low)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no length; write 512, or 100:1000 for a range.") from error
    if not 1 <= lengths[0] <= lengths[1]:
        raise click.BadParameter(f"{text!r} must be at least 1 and must not fall.")
    return lengths


json_option = click.option("--json", "only_json", is_flag=True, help="Print the JSON line only.")
traceback_option = click.option("--traceback", is_flag=True, expose_value=False, help="Show a traceback on errors.")

_MODEL_OPTIONS = (
    click.option("-m", "--model", help="Local folder or Hugging Face id; the bundled tiny model when left out."),
    click.option("--revision", help="Branch, tag or commit on the hub."),
    click.option("--device", help="auto, cpu, gpu or gpu:N."),
    click.option("--dtype", help="auto, bfloat16 or float32."),
    click.option("--max-model-len", type=int, help="Tokens of prompt and answer together."),
    click.option("--max-num-seqs", type=int, help="Most requests in one step."),
    click.option("--max-num-batched-tokens", type=int, help="Most tokens in one step."),
    click.option("--block-size", type=int, help="Tokens per KV-cache page, a power of two."),
    click.option("--gpu-memory-utilization", type=float, help="Share of the GPU's memory to use."),
    click.option(
        "--kv-cache-memory-bytes",
        "--kv-cache-memory",
        type=size,
        metavar="SIZE",
        help="Size of the KV cache, e.g. 2GiB.",
    ),
    click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=None, help="Reuse shared prefixes."),
    click.option("--enforce-eager", is_flag=True, default=None, help="Never replay captured device graphs."),
    click.option(
        "--batch-invariant",
        is_flag=True,
        default=None,
        help="Same bits alone and in any batch; slower on a GPU, always so on the CPU.",
    ),
    click.option("--compiled", metavar="DIR", help="Load the kernels that `mili compile` put there."),
    click.option(
        "--hf-overrides", type=json_object, metavar="JSON", help="JSON merged over config.json, e.g. for YaRN."
    ),
)
_SAMPLING_OPTIONS = (
    click.option("--max-tokens", type=int, help="Most tokens to generate; to the context's end when left out."),
    click.option("--min-tokens", type=int, help="Fewest tokens before the end is allowed."),
    click.option("-t", "--temperature", type=float, help="0 takes the most likely token."),
    click.option("--top-p", type=float, help="Keep the most likely tokens with this total probability."),
    click.option("--top-k", type=int, help="Keep this many of the most likely tokens; 0 is off."),
    click.option("--min-p", type=float, help="Keep tokens at least this share as likely as the first."),
    click.option("--repetition-penalty", type=float, help="Above 1 discourages tokens already in prompt or answer."),
    click.option("--presence-penalty", type=float, help="Subtracted once from tokens already in the answer."),
    click.option("--frequency-penalty", type=float, help="Subtracted per occurrence in the answer."),
    click.option("--seed", type=int, help="Makes the random draws repeatable."),
    click.option("--stop", multiple=True, help="Text that ends the answer; may be given several times."),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on past the end-of-sequence token."),
)
MODEL_KEYS = (
    *("model", "revision", "device", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("block_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "enable_prefix_caching", "enforce_eager"),
    *("batch_invariant", "compiled", "hf_overrides"),
)
_SAMPLING_KEYS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "seed", "stop", "ignore_eos"),
)


def model_options(command: Command) -> Command:
    """Add the options that describe the model and the engine."""
    for option in reversed(_MODEL_OPTIONS):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """Add the options that describe how tokens are drawn."""
    for option in reversed(_SAMPLING_OPTIONS):
        command = option(command)
    return command


def print_json(result: Mapping[str, Any]) -> None:
    """One line of JSON on stdout, numbers to six digits."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.6g}")
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return {key: rounded(item) for key, item in value.items()} if isinstance(value, Mapping) else value

    click.echo(json.dumps(rounded(result)))


def show_progress() -> None:
    """Let mili say on stderr why a start takes its time."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("mili").setLevel(logging.INFO)


def build_llm(options: Mapping[str, Any]) -> "LLM":
    """The `LLM` that the given options describe; loads the model."""
    from mili.llm import LLM  # MAX and the weights load only now

    show_progress()
    return LLM(**{key: options[key] for key in MODEL_KEYS if options.get(key) is not None})


def build_sampling_params(llm: "LLM", options: Mapping[str, Any]) -> "SamplingParams":
    """The model's default parameters with the given options laid over them; `click.UsageError` for a bad value."""
    given = {key: options[key] for key in _SAMPLING_KEYS if options.get(key) not in (None, ())}
    try:
        return replace(llm.get_default_sampling_params(), **given)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
