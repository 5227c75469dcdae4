import json
import random
import sys

import numpy as np
import pytest

from mili.cli.main import main
from mili.cli.serving.client import EventParser, Record
from mili.cli.serving.results import summarise, table
from mili.cli.serving.workload import Lengths, Workload, poisson_times
from support.fake_openai import FakeOpenAI


@pytest.fixture
def bench(capsys):
    """Runs the command against a fake server; returns (exit code, the lines before the JSON, the JSON)."""

    def bench(server: FakeOpenAI, *words):
        with server.serve(), pytest.raises(SystemExit) as end:
            main(["bench", "serve", "--base-url", server.url, *map(str, words)])
        out, err = capsys.readouterr()
        if not out:
            return end.value.code, err, None
        *lines, last = out.splitlines()
        return end.value.code, "\n".join(lines), json.loads(last)

    return bench


# --- the whole command ---


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_closed_loop_counts_every_request_and_token(bench, endpoint):
    server = FakeOpenAI(first_delay=0.02, delay=0.005)
    code, text, result = bench(
        *(server, "--endpoint", endpoint, "--num-requests", 40, "--concurrent", 8, "--prompt-len", "5:50"),
        *("--output-len", "2:10", "--api-key", "sk-secret", "--num-warmups", 2, "--seed", 5),
    )
    assert code == 0
    measured = server.bodies[2:]
    assert (result["completed"], result["failed"], result["error_counts"]) == (40, 0, {})
    assert (result["model_id"], result["num_prompts"], result["max_concurrency"], result["seed"]) == (
        *("fake-model", 40, 8, 5),
    )
    assert result["request_rate"] == "inf"
    assert result["total_output_tokens"] == sum(body["max_tokens"] for body in measured)
    assert result["total_input_tokens"] == sum(len(str(body.get("prompt") or body["messages"])) for body in measured)
    assert result["tokens_per_chunk"] == 1
    assert server.most_in_flight == 8
    assert all(body["stream"] and body["ignore_eos"] and body["model"] == "fake-model" for body in measured)
    assert {header["authorization"] for header in server.headers} == {"Bearer sk-secret"}
    assert result["mean_ttft_ms"] >= 20 and result["p50_itl_ms"] >= 5
    assert result["request_throughput"] == pytest.approx(40 / result["duration"], rel=1e-4)
    assert "sk-secret" not in text + json.dumps(result)
    assert [line.split()[0] for line in text.splitlines() if line[:1].isupper()] == ["TTFT", "TPOT", "ITL", "E2E"]


def test_the_keys_are_those_of_vllm(bench):
    _, _, result = bench(FakeOpenAI(), "--num-requests", 2, "--output-len", 3)
    latencies = [
        f"{figure}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for figure in ("mean", "median", "std", "p50", "p90", "p95", "p99")
    ]
    assert set(latencies) <= result.keys()
    assert {
        *("date", "endpoint_type", "model_id", "num_prompts", "request_rate", "max_concurrency", "duration"),
        *("completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"),
        *("request_goodput", "output_throughput", "total_token_throughput"),
    } <= result.keys()


def test_an_open_loop_counts_from_the_time_a_request_was_due(bench):
    """One request at a time and 50 ms each, asked for at 200/s: the wait is the server's and must be seen."""
    words = ("--num-requests", 20, "--output-len", 1, "--num-warmups", 0, "--seed", 1)
    _, _, closed = bench(FakeOpenAI(first_delay=0.05, at_once=1), *words, "--concurrent", 1)
    server = FakeOpenAI(first_delay=0.05, at_once=1)
    _, _, result = bench(server, *words, "--request-rate", 200)
    assert server.most_in_flight > 10  # nothing held them back
    assert result["p99_e2el_ms"] > 700 and result["mean_ttft_ms"] > 300
    assert result["median_e2el_ms"] > 3 * closed["median_e2el_ms"]
    assert result["request_rate"] == 200 and result["max_concurrency"] is None


def test_every_failure_is_counted_by_its_kind(bench):
    faults = {1: 429, 2: 429, 3: 500, 4: "cut", 5: "drop", 6: "error", 7: "garbage", 8: "no usage"}
    code, text, result = bench(
        FakeOpenAI(faults=faults), "--num-requests", 12, "--concurrent", 1, "--output-len", 4, "--num-warmups", 1
    )
    assert code == 0
    assert (result["completed"], result["failed"]) == (4, 8)
    assert result["error_counts"] == {
        **{"HTTP 429": 2, "HTTP 500": 1, "stream cut short": 1, "connection lost": 1, "error in stream": 1},
        **{"bad stream": 1, "no usage": 1},
    }
    assert result["total_output_tokens"] == 16
    assert "2 x HTTP 429 (as asked)" in text


def test_a_slow_server_is_a_timeout(bench):
    code, _, result = bench(
        *(FakeOpenAI(first_delay=5), "--num-requests", 3, "--timeout", 0.2, "--num-warmups", 0, "--model", "m"),
        *("--goodput", "ttft:1"),
    )
    assert code == 1  # nothing was measured
    assert result["error_counts"] == {"timeout": 3}
    assert result["mean_ttft_ms"] is None and result["output_throughput"] == 0 and result["request_goodput"] == 0


def test_several_tokens_in_a_chunk_are_counted_and_said(bench):
    server = FakeOpenAI(tokens_per_chunk=4, delay=0.01)
    _, text, result = bench(server, "--num-requests", 4, "--output-len", 16)
    assert result["total_output_tokens"] == 64
    assert result["tokens_per_chunk"] == 4
    assert result["mean_itl_ms"] > 3 * result["mean_tpot_ms"] * 0.9
    assert "a chunk had 4.00 tokens" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concurrent", "5", "--request-rate", "3"), "one of them"),
        (("--endpoint", "chat", "--prompt-kind", "token-ids"), "--prompt-kind text"),
        (("--prompt-len", "0"), "at least 1"),
        (("--prompt-len", "20:10"), "must not fall"),
        (("--output-len", "x"), "no length"),
        (("--goodput", "ttft:fast"), "ttft:200"),
        (("--goodput", "speed:3"), "'speed' is not one of ttft"),
        (("--request-rate", "0"), "0"),
    ],
)
def test_a_wrong_option_is_named(bench, words, message):
    code, err, _ = bench(FakeOpenAI(), *words)
    assert code == 2
    assert message in err


def test_a_server_that_is_not_there_or_refuses_is_said_at_once(bench, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "--base-url", "http://127.0.0.1:9/"])
    assert end.value.code == 2
    assert "127.0.0.1:9/v1/models" in capsys.readouterr().err
    code, err, _ = bench(FakeOpenAI(faults={0: 401}))
    assert code == 2
    assert "HTTP 401: as asked" in err


@pytest.mark.parametrize("module", ["uvloop", "aiohttp"])
def test_a_missing_extra_is_named(capsys, monkeypatch, module):
    for name in ("client", "results"):
        monkeypatch.delitem(sys.modules, f"mili.cli.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve"])
    assert end.value.code == 2
    assert capsys.readouterr().err == f'error: {module} is not installed: pip install "mili[serve]"\n'


# --- the load ---


def workload(**changes):
    fields = {"model": "m", "endpoint": "completions", "prompt_kind": "token-ids", "prompt_len": Lengths(10, 20)}
    fields |= {"output_len": Lengths(3, 3), "prefix_len": 0, "vocab_size": 100, "temperature": 0.0, "ignore_eos": True}
    return Workload(**(fields | changes))


def test_prompts_are_random_repeatable_and_of_the_lengths_asked():
    bodies = workload().bodies(300, seed=1)
    assert bodies == workload().bodies(300, seed=1) != workload().bodies(300, seed=2)
    prompts = [json.loads(body)["prompt"] for body in bodies]
    assert {len(prompt) for prompt in prompts} == set(range(10, 21))
    assert len({tuple(prompt) for prompt in prompts}) == 300
    assert {token for prompt in prompts for token in prompt} == set(range(100))
    assert {json.loads(body)["max_tokens"] for body in bodies} == {3}


def test_the_shared_prefix_is_the_same_and_comes_on_top():
    bodies = workload(prefix_len=7, prompt_kind="text").bodies(50, seed=1)
    prompts = [json.loads(body)["prompt"].split(" ") for body in bodies]
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1
    assert {len(prompt) for prompt in prompts} <= set(range(17, 28))
    assert len({tuple(prompt[7:12]) for prompt in prompts}) > 40


def test_chat_bodies_and_those_for_other_servers():
    (body,) = workload(endpoint="chat", prompt_kind="text", ignore_eos=False).bodies(1, seed=0)
    value = json.loads(body)
    assert value["messages"][0]["role"] == "user" and isinstance(value["messages"][0]["content"], str)
    assert "ignore_eos" not in value and "prompt" not in value


def test_send_times_are_a_poisson_process():
    times = np.array(poisson_times(20_000, rate=50.0, seed=3))
    assert times.tolist() == poisson_times(20_000, rate=50.0, seed=3) != poisson_times(20_000, rate=50.0, seed=4)
    gaps = np.diff(times, prepend=0.0)
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # exponential: the spread is the mean
    assert np.mean(gaps > 2 / 50) == pytest.approx(np.exp(-2), abs=0.01)
    counts = np.bincount(times.astype(int))[:-1]  # in each second
    assert counts.var() == pytest.approx(counts.mean(), rel=0.2)


# --- the figures ---


def record(due, token_times, ended, tokens, error=None):
    return Record(due, due, list(token_times), ended, 10, tokens, error)


def test_figures_are_those_of_their_definitions():
    draw = random.Random(0)
    records, ttft, tpot, gaps, e2e = [], [], [], [], []
    for index in range(101):
        due, first, num = index * 0.1, draw.random(), draw.randrange(2, 30)
        steps = [draw.random() * 0.05 for _ in range(num - 1)]
        times = [due + first + sum(steps[:k]) for k in range(num)]
        records.append(record(due, times, times[-1] + 0.001, num))
        ttft.append(first * 1e3)
        tpot.append((sum(steps) + 0.001) / (num - 1) * 1e3)
        gaps += [step * 1e3 for step in steps]
        e2e.append((first + sum(steps) + 0.001) * 1e3)
    records += [record(0, [], 99, 0, "timeout")] * 7
    result = summarise(records, 20.0, {})
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", gaps), ("e2el", e2e)):
        assert result[f"mean_{name}_ms"] == pytest.approx(np.mean(values))
        assert result[f"median_{name}_ms"] == result[f"p50_{name}_ms"] == pytest.approx(np.median(values))
        assert result[f"std_{name}_ms"] == pytest.approx(np.std(values))
        for percentile in (90, 95, 99):
            assert result[f"p{percentile}_{name}_ms"] == pytest.approx(np.percentile(values, percentile)), name
    # by hand, without NumPy: of 101 values the 90th percentile is the 91st smallest
    assert result["p90_ttft_ms"] == pytest.approx(sorted(ttft)[90])
    num_out = sum(item.completion_tokens for item in records)
    assert (result["completed"], result["failed"], result["error_counts"]) == (101, 7, {"timeout": 7})
    assert result["output_throughput"] == pytest.approx(num_out / 20)
    assert result["total_token_throughput"] == pytest.approx((num_out + 1010) / 20)
    assert result["request_throughput"] == pytest.approx(101 / 20)
    assert result["request_goodput"] is None


def test_goodput_counts_requests_that_kept_every_limit():
    records = [
        record(0.0, [0.1, 0.2, 0.3], 0.3, 3),  # ttft 100, itl 100, tpot 100, e2e 300
        record(0.0, [0.2, 0.21, 0.22], 0.25, 3),  # ttft 200, itl 10, tpot 25, e2e 250
        record(0.0, [0.05], 1.0, 1),  # one token: no gap, no tpot
        record(0.0, [0.01, 0.02], 0.02, 2, "stream cut short"),  # fast, but no answer
    ]

    def good(**limits):
        return summarise(records, 2.0, limits)["request_goodput"] * 2

    assert good(ttft=1000) == 3
    assert good(ttft=100.001) == 2
    assert good(itl=50) == 2
    assert good(tpot=30) == 2
    assert good(e2e=300.001) == good(e2el=300.001) == 2
    assert good(ttft=150, itl=50) == 1
    assert good(ttft=150, itl=50, e2e=500) == 0


def test_the_table_warns_of_a_client_that_was_held_up():
    result = summarise([record(0.0, [0.1, 0.2], 0.3, 2)], 1.0, {"ttft": 200.0})
    result |= {"num_prompts": 1, "goodput": "ttft:200", "client_utilization": 0.1, "max_concurrency": None}
    assert "1.00/s within ttft:200" in table(result, {})
    assert "too little of a core" not in table(result, {})
    assert "too little of a core" in table(result | {"client_utilization": 0.95}, {})
    assert "too little of a core" in table(result | {"max_send_delay_ms": 60.0}, {})
    late = [Record(1.0, 1.07, [1.1, 1.2], 1.3, 10, 2)]
    assert summarise(late, 1.0, {})["max_send_delay_ms"] == pytest.approx(70)


def test_events_are_the_same_however_they_are_cut():
    stream = 'data: {"text": "é"}\r\n\r\n: comment\n\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'.encode()
    expected = ['{"text": "é"}'.encode(), b"two\nlines", b"[DONE]"]
    assert EventParser().feed(stream) == expected
    for size in range(1, len(stream)):
        parser = EventParser()
        events = [event for at in range(0, len(stream), size) for event in parser.feed(stream[at : at + size])]
        assert events == expected, size


# --- against the real server ---


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_real_server_is_measured(capsys, live_url, endpoint):
    words = ["--endpoint", endpoint, "--num-requests", "12", "--concurrent", "4", "--output-len", "3:8"]
    words += ["--prompt-len", "20:40", "--seed", "7", "--prefix-len", "32", "--goodput", "e2e:60000"]
    with pytest.raises(SystemExit) as end:
        main(["bench", "serve", "--base-url", f"{live_url}/v1", *words])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 0
    assert (result["completed"], result["error_counts"]) == (12, {})
    output_lens = [
        json.loads(body)["max_tokens"]
        for body in workload(prompt_len=Lengths(20, 40), output_len=Lengths(3, 8)).bodies(12, seed=7)
    ]
    assert result["total_output_tokens"] == sum(output_lens)
    assert result["request_goodput"] == result["request_throughput"]
    assert 0 < result["mean_ttft_ms"] < result["mean_e2el_ms"]
    if endpoint == "completions":
        assert 12 * 52 <= result["total_input_tokens"] <= 12 * 72
