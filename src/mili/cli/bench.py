"""`mili bench`: how fast this machine generates, beside how fast it could read the weights.

It times the public `LLM` only, so it measures what a caller gets. Prompts are random token ids, a fresh set for each
repeat, so that the prefix cache cannot help; the end-of-sequence token is ignored, so that each request runs to length.
The other benchmarks are its sub-commands.
"""

import json
import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mili.cli.bench_serve import serve
from mili.cli.options import build_llm, model_options, traceback_option
from mili.errors import RequestError

if TYPE_CHECKING:
    from mili.llm import LLM


@click.group(invoke_without_command=True)
@click.option("--prompt-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens per prompt.")
@click.option("--new", "num_new", type=click.IntRange(2), default=128, show_default=True, help="Tokens to generate.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once.")
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Timed runs; the one of median time counts."
)
@click.option("--json", "only_json", is_flag=True, help="Print the JSON line only.")
@model_options
@traceback_option
@click.pass_context
def bench(
    context: click.Context, /, prompt_len: int, num_new: int, batch: int, repeat: int, only_json: bool, **options: Any
) -> None:
    """Measure speed beside the memory's ceiling.

    Tokens per second, time to first token, time between tokens and bytes per second.
    The last line is JSON; times in seconds, rates per second.
    """
    if context.invoked_subcommand is not None:
        for option in context.command.params:
            if context.get_parameter_source(option.name or "") not in (ParameterSource.DEFAULT, None):
                raise click.UsageError(f"{option.opts[-1]} is no option of {context.invoked_subcommand} there.")
        return
    from mili.cli.bandwidth import cpu_read_bandwidth, gpu_copy_bandwidth

    start = time.perf_counter()
    with build_llm(options) as llm:
        load_seconds = time.perf_counter() - start
        if prompt_len + num_new > llm.max_model_len:
            raise RequestError(
                f"--prompt-len {prompt_len} + --new {num_new} is more than max_model_len {llm.max_model_len}: "
                "lower one of them"
            )
        _run_once(llm, prompt_len, num_new, batch, seed=0)  # warms up
        runs = [_run_once(llm, prompt_len, num_new, batch, seed) for seed in range(1, repeat + 1)]
        median = sorted(runs, key=lambda run: run["total_s"])[repeat // 2]
        result: dict[str, Any] = {
            "model": llm.model,
            "device": llm.device,
            "dtype": llm.dtype,
            "batch": batch,
            "prompt_len": prompt_len,
            "new": num_new,
            "repeat": repeat,
            "load_s": load_seconds,
            **median,
        }
        step_bytes = _decode_step_bytes(llm, batch, prompt_len + num_new / 2)
        on_gpu = llm.device != "cpu"
    result["decode_bytes_per_s"] = step_bytes / result["itl_s"]
    result["ceiling_bytes_per_s"] = gpu_copy_bandwidth() if on_gpu else cpu_read_bandwidth()
    if not only_json:
        click.echo(_table(result))
    click.echo(json.dumps({key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in result.items()}))


bench.add_command(serve)


def _run_once(llm: "LLM", prompt_len: int, num_new: int, batch: int, seed: int) -> dict[str, float]:
    """Generate once; rates over the whole batch, times as means over its requests."""
    from mili.sampling_params import SamplingParams

    draw = random.Random(seed)
    prompts = [[draw.randrange(llm.model_config.vocab_size) for _ in range(prompt_len)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    first, gaps = [], []
    for output in outputs:
        metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
        assert metrics is not None and metrics.time_to_first_token is not None and num_tokens == num_new
        assert metrics.finished_time is not None and metrics.first_token_time is not None
        first.append(metrics.time_to_first_token)
        gaps.append((metrics.finished_time - metrics.first_token_time) / (num_new - 1))
    return {
        "total_s": seconds,
        "ttft_s": statistics.mean(first),
        "itl_s": statistics.mean(gaps),
        "prefill_tokens_per_s": batch * prompt_len / max(first),
        "decode_tokens_per_s": batch / statistics.mean(gaps),
        "output_tokens_per_s": batch * num_new / seconds,
    }


def _decode_step_bytes(llm: "LLM", batch: int, mean_len: float) -> float:
    """Bytes one decode step must read: the weights, but only a few rows of an untied input embedding, and the KV."""
    model, memory = llm.model_config, llm.memory
    itemsize = 2 if llm.dtype == "bfloat16" else 4
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * itemsize
    return memory.weight_bytes - embedding + batch * mean_len * memory.kv_bytes_per_token


def _table(result: dict[str, Any]) -> str:
    achieved, ceiling = result["decode_bytes_per_s"] / 1e9, result["ceiling_bytes_per_s"] / 1e9
    rows = [
        ("model", f"{result['model']}, {result['dtype']} on {result['device']}, loaded in {result['load_s']:.1f} s"),
        ("work", f"{result['batch']} x ({result['prompt_len']} prompt + {result['new']} new), {result['repeat']} runs"),
        ("prefill", f"{result['prefill_tokens_per_s']:,.1f} tok/s"),
        ("decode", f"{result['decode_tokens_per_s']:,.1f} tok/s"),
        ("end to end", f"{result['output_tokens_per_s']:,.1f} new tok/s, {result['total_s']:.3f} s"),
        ("TTFT", f"{result['ttft_s'] * 1e3:,.2f} ms"),
        ("ITL", f"{result['itl_s'] * 1e3:,.3f} ms"),
        ("memory", f"{achieved:,.1f} GB/s of {ceiling:,.1f} GB/s measured ({achieved / ceiling:.0%})"),
    ]
    return "\n".join(f"{name:<11}{text}" for name, text in rows)
