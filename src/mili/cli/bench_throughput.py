"""`mili bench throughput`: many requests of different lengths at once, from the first arrival to the last token.

The default is the workload of nano-vLLM's benchmark, token for token: 256 sequences, 100 to 1024 tokens in and out,
seed 0, temperature 0.6. It times the public `LLM` only; all requests arrive together and run to length.
"""

import random
import statistics
import time
from typing import TYPE_CHECKING, Any

import click

from mili.cli.options import build_llm, json_option, length_range, model_options, print_json, traceback_option
from mili.errors import RequestError

if TYPE_CHECKING:
    from mili.llm import LLM

_HIGHEST_ID = 10_000  # of a prompt's tokens; lower where the vocabulary ends


@click.command()
@click.option("--num-requests", "--num-prompts", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--prompt-len",
    type=length_range,
    metavar="N|LOW:HIGH",
    default="100:1024",
    show_default=True,
    help="Tokens of a prompt.",
)
@click.option(
    "--new",
    "new_len",
    type=length_range,
    metavar="N|LOW:HIGH",
    default="100:1024",
    show_default=True,
    help="Tokens to generate for it.",
)
@click.option("--temperature", type=click.FloatRange(0), default=0.6, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and lengths.")
@click.option(
    "--num-warmups", type=click.IntRange(0), default=1, show_default=True, help="Whole runs before, other prompts."
)
@click.option(
    "--repeat", type=click.IntRange(1), default=1, show_default=True, help="Timed runs; the one of median time counts."
)
@json_option
@model_options
@traceback_option
def throughput(
    num_requests: int,
    prompt_len: tuple[int, int],
    new_len: tuple[int, int],
    temperature: float,
    seed: int,
    num_warmups: int,
    repeat: int,
    only_json: bool,
    **options: Any,
) -> None:
    """Time many requests of random lengths.

    Without options the workload is that of nano-vLLM's benchmark: 256 requests, 100 to 1024 tokens in and out.

    The share of the roofline is the least time for these requests, all prompts in one step and then steps as full as
    --max-num-seqs allows, each reading weights and KV cache once, over the time taken. The last line is JSON.
    """
    from mili.cli.device import ceilings, memory_in_use
    from mili.cli.roofline import generation, prefill

    if options["max_num_seqs"] is None:
        options["max_num_seqs"] = min(num_requests, 256)
    start = time.perf_counter()
    with build_llm(options) as llm:
        load_seconds = time.perf_counter() - start
        if prompt_len[1] + new_len[1] > llm.max_model_len:
            raise RequestError(
                f"--prompt-len {prompt_len[1]} + --new {new_len[1]} is more than max_model_len {llm.max_model_len}: "
                "lower one of them"
            )
        vocab_size = llm.model_config.vocab_size
        for extra in range(num_warmups):
            _run_once(llm, *workload(num_requests, prompt_len, new_len, seed + 1 + extra, vocab_size), temperature)
        runs = []
        for i in range(repeat):  # a repeat's prompts are the same lengths of other tokens: no prefix is known
            prompts, lengths = workload(num_requests, prompt_len, new_len, seed, vocab_size)
            rotated = [[(token + i) % vocab_size for token in prompt] for prompt in prompts]
            runs.append(_run_once(llm, rotated, lengths, temperature))
        memory, at = memory_in_use(llm.device), ceilings(llm.device, llm.dtype)
        pairs = [(len(prompt), new) for prompt, new in zip(prompts, lengths, strict=True)]
        model, dtype = llm.model_config, llm.dtype
        floor = prefill(model, dtype, [prompt for prompt, _ in pairs]).seconds(at)
        floor += generation(model, dtype, pairs, options["max_num_seqs"]).seconds(at)
        run = sorted(runs, key=lambda run: run["total_s"])[repeat // 2]
        result = {
            "model": llm.model,
            "device": llm.device,
            "dtype": dtype,
            "load_s": load_seconds,
            "num_requests": num_requests,
            "max_num_seqs": options["max_num_seqs"],
            "repeat": repeat,
            "input_tokens": sum(prompt for prompt, _ in pairs),
            "output_tokens": sum(lengths),
            **run,
            "requests_per_s": num_requests / run["total_s"],
            "output_tokens_per_s": sum(lengths) / run["total_s"],
            "total_tokens_per_s": sum(map(sum, pairs)) / run["total_s"],
            "total_roofline": None if at.flops_per_s is None else floor / run["total_s"],
            "memory_bytes": memory,
            "ceiling_bytes_per_s": at.bytes_per_s,
            "ceiling_flops_per_s": at.flops_per_s,
        }
    if not only_json:
        click.echo(_table(result))
    print_json(result)


def workload(
    num_requests: int, prompt_len: tuple[int, int], new_len: tuple[int, int], seed: int, vocab_size: int
) -> tuple[list[list[int]], list[int]]:
    """Prompts and numbers of new tokens; by default those of nano-vLLM's `bench.py`, drawn in the order it draws."""
    draw = random.Random(seed)
    highest = min(_HIGHEST_ID, vocab_size - 1)
    prompts = [[draw.randint(0, highest) for _ in range(draw.randint(*prompt_len))] for _ in range(num_requests)]
    return prompts, [draw.randint(*new_len) for _ in range(num_requests)]


def _run_once(llm: "LLM", prompts: list[list[int]], lengths: list[int], temperature: float) -> dict[str, float]:
    from mili.sampling_params import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in lengths
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    first = [m.time_to_first_token for m in metrics if m.time_to_first_token is not None]
    return {
        "total_s": seconds,
        "ttft_s": statistics.mean(first),
        "median_ttft_s": statistics.median(first),
        "max_ttft_s": max(first),
        "num_preemptions": sum(m.num_preemptions for m in metrics),
    }


def _table(result: dict[str, Any]) -> str:
    share = result["total_roofline"]
    rows = [
        ("model", f"{result['model']}, {result['dtype']} on {result['device']}, loaded in {result['load_s']:.1f} s"),
        (
            "work",
            f"{result['num_requests']} requests, {result['input_tokens']:,} tokens in and "
            f"{result['output_tokens']:,} out, at most {result['max_num_seqs']} at once",
        ),
        ("time", f"{result['total_s']:.3f} s, {'-' if share is None else f'{share:.0%}'} of the roofline"),
        ("output", f"{result['output_tokens_per_s']:,.1f} tok/s"),
        ("in and out", f"{result['total_tokens_per_s']:,.1f} tok/s, {result['requests_per_s']:,.2f} requests/s"),
        ("TTFT", f"mean {result['ttft_s'] * 1e3:,.1f} ms, last {result['max_ttft_s'] * 1e3:,.1f} ms"),
        ("memory", f"{result['memory_bytes'] / 2**30:.2f} GiB in use, {result['num_preemptions']:.0f} preemptions"),
    ]
    return "\n".join(f"{name:<11}{text}" for name, text in rows)
