"""A server under load: every request ends once, nothing leaks, and the metrics add up to what the clients saw.

The server is `mili serve` in a process of its own with the bundled model, as a user would start it.
"""

import asyncio
import re
import time
from pathlib import Path

import httpx
import pytest

from support.live import serve
from support.load import crowd

NUM_REQUESTS, CONCURRENCY = 1000, 50


@pytest.fixture(scope="module")
def server():
    with serve("--max-num-seqs", "32", "--max-queue", "200", "--no-access-log") as live:
        yield live


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the series of `name` that have `labels`."""
    total = 0.0
    for series, value in re.findall(rf"^mili:{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE):
        if all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
            total += float(value)
    return total


def metrics(server) -> str:
    return httpx.get(f"{server.url}/metrics").text


def settled_metrics(server) -> str:
    """The metrics once nothing runs: a client that left may be noticed a step later."""
    deadline = time.monotonic() + 20
    while True:
        text = metrics(server)
        if metric(text, "num_requests_running") == metric(text, "num_requests_waiting") == 0:
            return text
        assert time.monotonic() < deadline, "requests still run although every client has gone"
        time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


COUNTERS = ("prompt_tokens_total", "generation_tokens_total")


def test_metrics_add_up_to_what_the_clients_saw(server):
    before = settled_metrics(server)
    tally = asyncio.run(crowd(server.url, 200, CONCURRENCY, seed=1, invalid=0.1))
    after = settled_metrics(server)

    def grown(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert tally.outcomes["cancelled"] == 0
    for reason in ("stop", "length"):
        assert grown("request_success_total", finished_reason=reason) == tally.finish_reasons[reason]
    assert grown("generation_tokens_total") == tally.completion_tokens
    assert grown("request_generation_tokens_sum") == tally.completion_tokens
    assert grown("request_prompt_tokens_sum") == tally.prompt_tokens
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert grown(f"{name}_count") == tally.outcomes["finished"]
    assert grown("http_requests_total", status="200", method="POST") == tally.outcomes["finished"]
    refused = grown("http_requests_total", status="400") + grown("http_requests_total", status="404")
    assert refused == tally.outcomes["refused"]
    assert grown("request_aborted_total") == grown("request_failure_total") == 0
    assert grown("inter_token_latency_seconds_count") <= tally.completion_tokens


def test_a_thousand_requests_a_third_of_them_cancelled_three_times_over(server):
    asyncio.run(crowd(server.url, NUM_REQUESTS // 5, CONCURRENCY, seed=2, leavers=1 / 3, invalid=0.05))
    start = settled_metrics(server)
    resident = []
    for round_number in range(3):
        before = settled_metrics(server)
        tally = asyncio.run(
            crowd(server.url, NUM_REQUESTS, CONCURRENCY, seed=10 + round_number, leavers=1 / 3, invalid=0.05)
        )
        after = settled_metrics(server)
        resident.append(resident_bytes(server.pid))
        assert tally.outcomes["cancelled"] > NUM_REQUESTS / 10, "the crowd does leave early"
        assert tally.outcomes["finished"] > NUM_REQUESTS / 3
        success = metric(after, "request_success_total") - metric(before, "request_success_total")
        aborted = metric(after, "request_aborted_total") - metric(before, "request_aborted_total")
        # A client that leaves may have been served already, or not have been heard yet.
        assert tally.outcomes["finished"] <= success
        assert success + aborted <= tally.outcomes["finished"] + tally.outcomes["cancelled"]
        assert metric(after, "request_failure_total") == 0
        assert metric(after, "kv_cache_usage_perc") == metric(start, "kv_cache_usage_perc") == 0.0
    assert resident[2] < resident[0] * 1.03 + (4 << 20), f"memory grows: {resident}"
    assert httpx.get(f"{server.url}/ready").status_code == 200
