"""`mili bench latency`: a fixed batch of equal prompts, from arrival to the last token.

It times the public `LLM` only. Prompts are random token ids, a fresh set for each repeat, so that the prefix cache
cannot help; the end-of-sequence token is ignored, so that each request runs to length.
"""

import random
import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mili.cli.options import build_llm, json_option, model_options, print_json, traceback_option
from mili.errors import RequestError

if TYPE_CHECKING:
    from mili.cli.roofline import Ceilings
    from mili.llm import LLM


def _batches(text: str) -> list[int]:
    """`1,8,64` as [1, 8, 64]."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of batches; write for example 1,8,64.") from error
    if min(batches) < 1:
        raise click.BadParameter(f"{text!r} has a batch below 1.")
    return batches


@click.command()
@click.option("--prompt-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens per prompt.")
@click.option("--new", "num_new", type=click.IntRange(2), default=128, show_default=True, help="Tokens to generate.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once.")
@click.option("--sweep", type=_batches, metavar="N,N,...", help="Several batches, one after the other.")
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Timed runs; the one of median time counts."
)
@json_option
@model_options
@traceback_option
def latency(
    prompt_len: int,
    num_new: int,
    batch: int,
    sweep: list[int] | None,
    repeat: int,
    only_json: bool,
    **options: Any,
) -> None:
    """Time one batch of equal prompts.

    TTFT: time to first token, mean of the requests. ITL: time between tokens after the first, mean of the requests;
    other prompts' prefill is in it. Step: the same of the request that begins last, while all decode; if they do not
    begin together, it is timed in runs of its own, where that request ends before the others; it is unknown if --new is
    too small for that.

    Each share of the roofline is the least time that reading weights and KV cache once a step, at the memory speed
    measured here, and multiplying, at the speed of the matrix unit, would take, over the time taken.

    The last line is JSON; with --sweep one object for each batch is in its list "sweep".
    """
    from mili.cli.device import ceilings, memory_in_use

    batches = sweep or [batch]
    if options["max_num_seqs"] is None and max(batches) > 64:  # LLM's default would make a queue of the batch
        options["max_num_seqs"] = max(batches)
    start = time.perf_counter()
    with build_llm(options) as llm:
        load_seconds = time.perf_counter() - start
        if prompt_len + num_new > llm.max_model_len:
            raise RequestError(
                f"--prompt-len {prompt_len} + --new {num_new} is more than max_model_len {llm.max_model_len}: "
                "lower one of them"
            )
        head = {"model": llm.model, "device": llm.device, "dtype": llm.dtype, "load_s": load_seconds}
        timed = [(size, _median_run(llm, prompt_len, num_new, size, repeat)) for size in batches]
        memory = memory_in_use(llm.device)
        at = ceilings(llm.device, llm.dtype)  # last: a measurement of memory speed needs memory of its own
        results = []
        for size, run in timed:
            work = {"batch": size, "prompt_len": prompt_len, "new": num_new, "repeat": repeat}
            results.append({**work, **run, **_shares(llm, at, size, prompt_len, num_new, run)})
    tail = {"memory_bytes": memory, "ceiling_bytes_per_s": at.bytes_per_s, "ceiling_flops_per_s": at.flops_per_s}
    if not only_json:
        click.echo("\n".join(_table(head, tail, results)))
    print_json({**head, **(results[0] if sweep is None else {"sweep": results}), **tail})


def _median_run(llm: "LLM", prompt_len: int, num_new: int, batch: int, repeat: int) -> dict[str, Any]:
    """The run of median time, after one that warms up."""
    runs = [_run_once(llm, prompt_len, num_new, batch, seed) for seed in range(repeat + 1)][1:]
    return sorted(runs, key=lambda run: run["total_s"])[repeat // 2]


def _run_once(llm: "LLM", prompt_len: int, num_new: int, batch: int, seed: int) -> dict[str, Any]:
    """Generate once, and again for the step if the requests do not begin together; rates over the whole batch."""
    start = time.perf_counter()
    runs = _generate(llm, prompt_len, [num_new] * batch, f"{batch} {seed}")
    seconds = time.perf_counter() - start
    starts = [run.time_to_first_token for run in runs]
    gaps = [run.gap for run in runs]
    step: float | None = gaps[-1]
    ahead = len(set(starts))  # about as many tokens has the first request when the last begins
    if ahead > 1:  # it would end before that one, whose last steps would be those of a smaller batch
        step = None
    while step is None and num_new - ahead > 1:
        fewer = [num_new] * (batch - 1) + [num_new - ahead]
        *others, last = _generate(llm, prompt_len, fewer, f"{batch} {seed} {ahead}")
        if last.finished_time <= min(run.finished_time for run in others):
            step = last.gap
        ahead *= 2
    return {
        "total_s": seconds,
        "ttft_s": statistics.mean(starts),
        "itl_s": statistics.mean(gaps),
        "step_s": step,
        "prefill_tokens_per_s": batch * prompt_len / max(starts),
        "decode_tokens_per_s": step and batch / step,
        "output_tokens_per_s": batch * num_new / seconds,
    }


class _Times(NamedTuple):
    """Of one request."""

    time_to_first_token: float
    finished_time: float
    gap: float  # mean time between its tokens


def _generate(llm: "LLM", prompt_len: int, num_new: list[int], seed: str) -> list[_Times]:
    """Times of fresh random prompts with so many new tokens each."""
    from mili.sampling_params import SamplingParams

    draw = random.Random(seed)
    prompts = [[draw.randrange(llm.model_config.vocab_size) for _ in range(prompt_len)] for _ in num_new]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in num_new]
    times = []
    for output, wanted in zip(llm.generate(prompts, params, use_tqdm=False), num_new, strict=True):
        metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
        assert metrics is not None and metrics.time_to_first_token is not None and num_tokens == wanted
        assert metrics.finished_time is not None and metrics.first_token_time is not None
        gap = (metrics.finished_time - metrics.first_token_time) / (wanted - 1)
        times.append(_Times(metrics.time_to_first_token, metrics.finished_time, gap))
    return times


def _shares(
    llm: "LLM", at: "Ceilings", batch: int, prompt_len: int, num_new: int, run: dict[str, Any]
) -> dict[str, float | None]:
    """Least times over times taken: of the prompts, of a decode step of mean context, of the whole."""
    from mili.cli.roofline import decode_step, generation, prefill

    model, dtype = llm.model_config, llm.dtype
    step = decode_step(model, dtype, batch, prompt_len + num_new / 2)
    first = prefill(model, dtype, [prompt_len] * batch).seconds(at)
    rest = generation(model, dtype, [(prompt_len, num_new)] * batch, batch).seconds(at)
    decoded = run["step_s"] is not None
    known = at.flops_per_s is not None  # prompts are bound by the matrix unit
    return {
        "decode_bytes_per_s": step.bytes / run["step_s"] if decoded else None,
        "decode_roofline": step.seconds(at) / run["step_s"] if decoded else None,
        "prefill_roofline": first * run["prefill_tokens_per_s"] / (batch * prompt_len) if known else None,
        "total_roofline": (first + rest) / run["total_s"] if known else None,
    }


def _table(head: dict[str, Any], tail: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    flops = tail["ceiling_flops_per_s"]
    matrix = "an unknown matrix speed" if flops is None else f"{flops / 1e12:,.2f} TFLOP/s"
    lines = [
        f"{head['model']}, {head['dtype']} on {head['device']}, loaded in {head['load_s']:.1f} s, "
        f"{tail['memory_bytes'] / 2**30:.2f} GiB in use",
        f"{results[0]['prompt_len']} prompt + {results[0]['new']} new tokens, {results[0]['repeat']} runs; "
        f"roofline: {tail['ceiling_bytes_per_s'] / 1e9:,.1f} GB/s, {matrix}",
        f"{'batch':>5}{'prefill tok/s':>15}{'roof':>6}{'decode tok/s':>14}{'roof':>6}{'step ms':>9}"
        f"{'ITL ms':>9}{'TTFT ms':>10}{'total s':>9}{'roof':>6}",
    ]
    for row in results:
        rate, step = row["decode_tokens_per_s"], row["step_s"]
        decode = f"{'-':>14}{'-':>6}{'-':>9}"
        if step is not None:
            decode = f"{rate:>14,.1f}{_percent(row['decode_roofline']):>6}{step * 1e3:>9.3f}"
        lines.append(
            f"{row['batch']:>5}{row['prefill_tokens_per_s']:>15,.1f}{_percent(row['prefill_roofline']):>6}{decode}"
            f"{row['itl_s'] * 1e3:>9.3f}{row['ttft_s'] * 1e3:>10.2f}{row['total_s']:>9.3f}"
            f"{_percent(row['total_roofline']):>6}"
        )
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
