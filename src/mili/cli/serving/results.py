"""From the records of a load to the figures people compare, under the names that `vllm bench serve` gives them.

Times are in milliseconds here, as those names say. Invariant: only requests that completed count towards latencies,
tokens and goodput; the others are counted by how they failed.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mili.cli.serving.client import Record

PERCENTILES = (50, 90, 95, 99)


def ttft_ms(record: Record) -> float:
    """Time to first token."""
    return (record.token_times[0] - record.due) * 1e3


def e2e_ms(record: Record) -> float:
    """From when the request was due to its last byte."""
    return (record.ended - record.due) * 1e3


def tpot_ms(record: Record) -> float:
    """Time per output token after the first; 0 for a single token."""
    if record.completion_tokens < 2:
        return 0.0
    return (record.ended - record.token_times[0]) * 1e3 / (record.completion_tokens - 1)


def gaps_ms(record: Record) -> list[float]:
    """The times between the chunks that carried output."""
    gaps: list[float] = (np.diff(record.token_times) * 1e3).tolist()
    return gaps


def mean_itl_ms(record: Record) -> float:
    """The mean of its gaps; 0 where there is none."""
    num_gaps = len(record.token_times) - 1
    return (record.token_times[-1] - record.token_times[0]) * 1e3 / max(num_gaps, 1)


OBJECTIVES: Mapping[str, Callable[[Record], float]] = {
    "ttft": ttft_ms,
    "tpot": tpot_ms,
    "itl": mean_itl_ms,
    "e2e": e2e_ms,
    "e2el": e2e_ms,  # vLLM's name
}


def summarise(records: Sequence[Record], duration: float, objectives: Mapping[str, float]) -> dict[str, Any]:
    """The figures of a load that took `duration` seconds; `objectives` are limits in ms, by name."""
    done = [record for record in records if record.error is None]
    num_in = sum(record.prompt_tokens for record in done)
    num_out = sum(record.completion_tokens for record in done)
    num_chunks = sum(len(record.token_times) for record in done)
    num_good = sum(all(OBJECTIVES[name](record) <= limit for name, limit in objectives.items()) for record in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "error_counts": dict(Counter(record.error for record in records if record.error is not None).most_common()),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "tokens_per_chunk": num_out / num_chunks if num_chunks else None,
        "max_send_delay_ms": max((record.sent - record.due for record in records), default=0.0) * 1e3,
        "request_throughput": len(done) / duration,
        "request_goodput": num_good / duration if objectives else None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
    }
    result |= _statistics("ttft", [ttft_ms(record) for record in done])
    result |= _statistics("tpot", [tpot_ms(record) for record in done if record.completion_tokens > 1])
    result |= _statistics("itl", [gap for record in done for gap in gaps_ms(record)])
    result |= _statistics("e2el", [e2e_ms(record) for record in done])
    return result


def _statistics(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, spread and percentiles of a latency; None where nothing was measured."""
    keys = ("mean", "std", "median", *(f"p{percentile}" for percentile in PERCENTILES))
    if not values:
        return {f"{key}_{name}_ms": None for key in keys}
    array = np.asarray(values)
    figures = (array.mean(), array.std(), np.median(array), *np.percentile(array, PERCENTILES))
    return {f"{key}_{name}_ms": float(figure) for key, figure in zip(keys, figures, strict=True)}


def table(result: Mapping[str, Any], details: Mapping[str, str]) -> str:
    """The figures for people; `details` says of each kind of error what one of them was."""
    failed = "; ".join(
        f"{count} x {kind}" + (f" ({details[kind]})" if details[kind] else "")
        for kind, count in result["error_counts"].items()
    )
    goodput = result["request_goodput"]
    rows = [
        ("completed", f"{result['completed']:,} of {result['num_prompts']:,} in {result['duration']:,.2f} s"),
        *([("failed", failed)] if failed else []),
        ("requests", f"{result['request_throughput']:,.2f}/s"),
        *([("goodput", f"{goodput:,.2f}/s within {result['goodput']}")] if goodput is not None else []),
        ("tokens", f"{result['output_throughput']:,.1f} output/s, {result['total_token_throughput']:,.1f} in all/s"),
        ("", f"{result['total_input_tokens']:,} prompt, {result['total_output_tokens']:,} output"),
        ("ms", "".join(f"{head:>12}" for head in ("mean", *(f"p{percentile}" for percentile in PERCENTILES)))),
    ]
    for title, name in (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"), ("E2E", "e2el")):
        keys = ("mean", *(f"p{percentile}" for percentile in PERCENTILES))
        values = [result[f"{key}_{name}_ms"] for key in keys]
        rows.append((title, "".join(f"{'-':>12}" if value is None else f"{value:>12,.2f}" for value in values)))
    client = f"busy {result['client_utilization']:.0%} of a core"
    if result["max_concurrency"] is None:
        client += f", sent at most {result['max_send_delay_ms']:,.1f} ms late"
    rows.append(("client", client))
    if (per_chunk := result["tokens_per_chunk"] or 1) > 1.05:
        rows.append(("note", f"a chunk had {per_chunk:.2f} tokens: ITL is between chunks, TPOT between tokens"))
    if result["client_utilization"] > 0.8 or result["max_send_delay_ms"] > 50:
        rows.append(("note", "the client had too little of a core: part of these latencies is its own"))
    return "\n".join(f"{name:<11}{text}" for name, text in rows)
