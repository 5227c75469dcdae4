"""Metrics: their names and kinds, and that they add up whatever happens to requests."""

import asyncio
import re
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mili.errors import ConfigError
from mili.progress import StepStats
from mili.server.config import ServerConfig
from mili.server.metrics import StepTotals
from support.server import BODY, COMPLETIONS, Gate, application

GAUGES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"),
    *("cache_config_info", "engine_ready", "startup_time_seconds"),
}
COUNTERS = {
    *("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "prefix_cache_queries", "prefix_cache_hits"),
    *("num_preemptions", "request_success", "admission_rejections", "request_aborted", "request_failure"),
    "http_requests",
}
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total"),
    "http_request_duration_seconds",
}


def families(text, prefix="mili"):
    """The families of an exposition by name without prefix; those of the process itself are left out."""
    own = {}
    for family in text_string_to_metric_families(text):
        if family.name.startswith(f"{prefix}:") and not family.name.endswith("_created"):
            own[family.name.removeprefix(f"{prefix}:")] = family
        else:
            assert family.name.startswith(("process_", f"{prefix}:")), family.name
    return own


@pytest.fixture
def served(monkeypatch):
    with application(monkeypatch) as served:
        yield served


def outcomes(served):
    """How many requests ended how, zeros left out."""
    kinds = {
        "request_success_total": ("finished_reason", ("stop", "length", "abort")),
        "request_aborted_total": ("reason", ("disconnect", "shutdown")),
        "request_failure_total": ("reason", ("error", "engine_dead")),
        "admission_rejections_total": ("reason", ("queue_full", "invalid")),
    }
    counts = {}
    for name, (label, values) in kinds.items():
        for value in values:
            number = served.metric(name, **{label: value})
            assert number is not None, "a series begins at 0, not at its first event"
            counts[value] = number
    return {value: number for value, number in counts.items() if number}


def test_every_name_of_the_list_is_there_with_its_kind_and_the_model(served):
    served.complete()
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = families(answer.text)
    kinds = {"gauge": GAUGES, "counter": COUNTERS, "histogram": HISTOGRAMS}
    assert {kind: {name for name, family in found.items() if family.type == kind} for kind in kinds} == kinds
    for name, family in found.items():
        assert family.documentation.endswith("."), name
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny-qwen3-code", name


@pytest.mark.parametrize("prefix", ["vllm", "my_llm"])
def test_the_prefix_is_a_setting(monkeypatch, prefix):
    with application(monkeypatch, metrics_prefix=prefix) as served:
        assert families(served.get("/metrics").text, prefix).keys() >= GAUGES | COUNTERS


@pytest.mark.parametrize("prefix", ["", "a-b", "1a", "a:", "\u00e9"])
def test_a_prefix_that_prometheus_refuses_is_refused_at_the_start(prefix):
    with pytest.raises(ConfigError, match="metrics_prefix"):
        ServerConfig(metrics_prefix=prefix)


def test_two_applications_do_not_share_metrics(monkeypatch):
    with application(monkeypatch) as one, application(monkeypatch) as other:
        one.complete()
        assert outcomes(one) == {"length": 1}
        assert outcomes(other) == {}


def test_a_request_leaves_its_times_and_sizes(served):
    tokens = served.llm.get_tokenizer().encode(BODY["prompt"])
    served.complete(max_tokens=5, n=3)
    served.complete(max_tokens=1)
    assert outcomes(served) == {"length": 2}
    sums = {"request_prompt_tokens": 2 * len(tokens), "request_generation_tokens": 16, "request_params_n": 4}
    for name, total in {**sums, "request_params_max_tokens": 6}.items():
        assert served.metric(f"{name}_sum") == total, name
        assert served.metric(f"{name}_count") == 2, name
    for name in HISTOGRAMS - sums.keys():
        if name.startswith(("request_", "e2e_", "time_")) and "per_output" not in name:
            assert served.metric(f"{name}_count") == 2, name
    assert served.metric("request_time_per_output_token_seconds_count") == 1, "one token has no time between tokens"
    parts = [f"request_{part}_time_seconds_sum" for part in ("queue", "prefill", "decode")]
    assert sum(map(served.metric, parts)) == pytest.approx(served.metric("e2e_request_latency_seconds_sum"))
    served.loop.run(asyncio.sleep(0.05))  # a step is reported after its tokens are
    assert served.metric("inter_token_latency_seconds_count") == 3 * 4
    assert served.metric("generation_tokens_total") == 16 + 1, "and the start's"


def test_the_tokens_of_steps_are_those_computed(served):
    tokens = served.llm.get_tokenizer().encode(BODY["prompt"])
    served.loop.run(asyncio.sleep(0.05))  # a step is reported after its tokens are, also the start's
    before = served.metric("iteration_tokens_total_sum")
    served.complete(max_tokens=5)
    served.loop.run(asyncio.sleep(0.05))  # a step is reported after its tokens are
    assert served.metric("iteration_tokens_total_sum") == before + len(tokens) + 4, "the last one is not computed on"


def test_gauges_are_read_when_asked(monkeypatch):
    gate = Gate()
    with application(monkeypatch, runner={"next_token": gate}, llm={"max_num_seqs": 2}) as served:

        async def look():
            gate.opened.clear()
            posts = [asyncio.create_task(served.client.post(COMPLETIONS, json=BODY)) for _ in range(5)]
            deadline = time.monotonic() + 10
            while (served.metric("num_requests_running"), served.metric("num_requests_waiting")) != (2, 3):
                assert time.monotonic() < deadline
                gate.opened.set()
                gate.opened.clear()
                await asyncio.sleep(0.01)
            used = served.metric("kv_cache_usage_perc")
            gate.opened.set()
            await asyncio.gather(*posts)
            return used

        assert 0 < served.loop.run(look()) < 1
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert served.metric(name) == 0


def test_every_request_has_exactly_one_outcome(monkeypatch):
    """A crowd of every kind: served, refused, left by the client, struck by a fault in a step."""
    # next_token is called for each sampled row; the request that draws the unlucky number takes its step down
    calls = []

    def next_token(token_ids):
        calls.append(len(token_ids))
        time.sleep(0.0005)
        if len(calls) == 400:
            raise RuntimeError("struck")
        return 300

    with application(monkeypatch, runner={"next_token": next_token}, llm={"max_num_seqs": 8}, max_queue=12) as served:

        async def one(number):
            stream = number % 2 == 0
            body = {**BODY, "max_tokens": 5 + number % 30, "stream": stream, "n": 1 + number % 3 % 2}
            if number % 7 == 0:
                body["temperature"] = -1
            post = asyncio.create_task(served.client.post(COMPLETIONS, json=body))
            if number % 5 == 0:
                await asyncio.sleep(0.002 * (number % 11))
                post.cancel()
            try:
                answer = await post
            except asyncio.CancelledError:
                return "cancelled"
            return answer.status_code if answer.status_code != 200 or "error" not in answer.text else 500

        async def crowd():
            results = []
            for start in range(0, 120, 40):
                results += await asyncio.gather(*map(one, range(start, start + 40)))
            return results

        seen = served.loop.run(crowd())
        served.loop.run(asyncio.wait_for(served.llm.wait_idle(), 10))
        counts = outcomes(served)
        refused_early = seen.count(400)  # never reached the engine
        assert counts["length"] >= seen.count(200) > 0
        assert counts["queue_full"] >= seen.count(429) > 0
        assert counts["error"] >= seen.count(500) > 0
        assert 0 < counts["disconnect"] <= seen.count("cancelled")
        assert sum(counts.values()) <= len(seen) - refused_early
        assert sum(counts.values()) >= len(seen) - refused_early - seen.count("cancelled")
        assert served.metric("e2e_request_latency_seconds_count") == counts["length"]


def test_what_the_engine_dies_of_is_a_failure_and_what_the_shutdown_ends_is_not(monkeypatch):
    for shutting_down, outcome in ((False, {"engine_dead": 1}), (True, {"shutdown": 1})):
        gate = Gate()
        with application(monkeypatch, runner={"next_token": gate}) as served:

            async def die(served=served, gate=gate):
                gate.opened.clear()
                post = asyncio.create_task(served.client.post(COMPLETIONS, json=BODY))
                await asyncio.sleep(0.1)
                closing = asyncio.create_task(asyncio.to_thread(served.llm.close))
                await asyncio.sleep(0.1)
                gate.opened.set()
                await closing
                return await post

            served.operation.metrics.shutting_down = shutting_down
            assert served.loop.run(die()).status_code == 503
            assert outcomes(served) == outcome


# --- HTTP ---


def requests_by(served, *names):
    """The counts of http_requests_total by these labels."""
    counts = {}
    for sample in families(served.get("/metrics").text)["http_requests"].samples:
        if sample.name.endswith("_total"):
            key = tuple(sample.labels[name] for name in names)
            counts[key] = counts.get(key, 0) + sample.value
    return counts


def test_requests_are_counted_by_route_not_by_path(served):
    for path in ("/v1/models/a", "/v1/models/b", "/v1/models/c/d"):
        served.get(path)
    for number in range(50):
        served.get(f"/wp-admin/{number}.php")
    served.complete()
    served.complete(400, n=-1)
    served.request("POST", COMPLETIONS, content="x", headers={"content-type": "text/plain"})
    served.request("BREW", "/health")
    counts = requests_by(served, "method", "path", "status")
    model_path = next(path for _, path, _ in counts if path.startswith("/v1/models"))
    assert model_path.startswith("/v1/models/{")
    assert counts == {
        ("GET", model_path, "404"): 3,
        ("GET", "unmatched", "404"): 50,
        ("POST", COMPLETIONS, "200"): 1,
        ("POST", COMPLETIONS, "400"): 1,
        ("POST", COMPLETIONS, "415"): 1,
        ("other", "/health", "405"): 1,
    }
    assert served.metric("http_request_duration_seconds_count", path=COMPLETIONS) == 3


def test_a_client_that_left_is_a_499(monkeypatch):
    gate = Gate()
    with application(monkeypatch, runner={"next_token": gate}) as served:

        async def leave(stream):
            sent, left = asyncio.Event(), asyncio.Event()
            body = b'{"prompt": "a", "max_tokens": 1000, "stream": %s}' % (b"true" if stream else b"false")
            messages = [{"type": "http.request", "body": body, "more_body": False}]
            started = asyncio.Event()

            async def receive():
                if messages:
                    sent.set()
                    return messages.pop()
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                started.set()

            scope = {
                **{"type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode()},
                **{"query_string": b"", "headers": [(b"content-type", b"application/json"), (b"content-length", b"9")]},
                **{"client": ("203.0.113.9", 5), "server": ("x", 80), "scheme": "http", "http_version": "1.1"},
                **{"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""},
            }
            call = asyncio.create_task(served.app(scope, receive, send))
            await sent.wait()
            if stream:
                await started.wait()
            else:
                gate.opened.clear()
                await asyncio.sleep(0.05)
            left.set()
            gate.opened.set()
            await asyncio.wait_for(call, 10)
            await asyncio.wait_for(served.llm.wait_idle(), 10)

        for stream in (False, True):
            gate.opened.set()
            served.loop.run(leave(stream))
        assert requests_by(served, "status")["499",] == 2
        assert outcomes(served) == {"disconnect": 2}
        assert served.metric("kv_cache_usage_perc") == 0


# --- the steps ---


def test_steps_fill_the_buckets_that_prometheus_expects():
    totals = StepTotals()
    for number in (1, 1, 2, 3, 5000, 20_000):
        totals.add(StepStats(number, [0.001, 0.0011, 2000.0]))
    tokens, times = totals.families("m:", "model")
    buckets = {sample.labels["le"]: sample.value for sample in tokens.samples if sample.name.endswith("_bucket")}
    assert (buckets["1.0"], buckets["2.0"], buckets["4.0"], buckets["8192.0"], buckets["+Inf"]) == (2, 3, 4, 5, 6)
    assert tokens.name == "m:iteration_tokens_total"
    buckets = {sample.labels["le"]: sample.value for sample in times.samples if sample.name.endswith("_bucket")}
    assert (buckets["0.001"], buckets["0.0025"], buckets["1000.0"], buckets["+Inf"]) == (6, 12, 12, 18)
    total = next(sample.value for sample in times.samples if sample.name.endswith("_sum"))
    assert total == pytest.approx(6 * 2000.0021)


def test_bounds_are_written_as_people_write_them(served):
    served.complete()
    bounds = set(re.findall(r'le="([^"]+)"', served.get("/metrics").text))
    assert {"0.0025", "0.25", "1000.0", "+Inf"} <= bounds
    assert all(len(bound) <= 8 for bound in bounds), bounds
