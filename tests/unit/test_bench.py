"""`mili bench latency`, `throughput` and `startup`, on fake runners and on the bundled model."""

import json
import sys

import pytest

from mili.cli import bench_startup, device
from mili.cli.bench_throughput import workload
from mili.cli.main import main
from mili.cli.roofline import Ceilings
from support import fake_llm

ROOFS = Ceilings(20e9, 100e9)
RATES = ("ttft_s", "itl_s", "step_s", "prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")
SHARES = ("decode_roofline", "prefill_roofline", "total_roofline")


@pytest.fixture
def runners(monkeypatch):
    monkeypatch.setattr(device, "ceilings", lambda name, dtype: ROOFS)
    return fake_llm.install(monkeypatch)


@pytest.fixture
def bench(capsys):
    """Runs `mili bench`; returns (lines before the JSON, the JSON)."""

    def bench(*words):
        with pytest.raises(SystemExit) as end:
            main(["bench", *map(str, words)])
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        *table, last = out.splitlines()
        return table, json.loads(last)

    return bench


def test_latency_reports_times_rates_and_shares(bench, runners):
    table, result = bench("latency", "--prompt-len", 20, "--new", 5, "--batch", 3, "--repeat", 2)
    assert (result["batch"], result["prompt_len"], result["new"], result["device"]) == (3, 20, 5, "cpu")
    assert all(result[key] > 0 for key in (*RATES, *SHARES, "load_s", "memory_bytes", "decode_bytes_per_s"))
    assert result["decode_tokens_per_s"] == pytest.approx(3 / result["step_s"], rel=1e-3)
    assert result["decode_roofline"] == pytest.approx(result["decode_bytes_per_s"] / 20e9, rel=1e-3)
    assert (result["ceiling_bytes_per_s"], result["ceiling_flops_per_s"]) == (20e9, 100e9)
    assert "TTFT" in table[2] and "0.10 TFLOP/s" in table[1] and "GiB in use" in table[0]
    prompts = [tuple(ids) for ids in runners[0].prefills]
    assert len(prompts) == len(set(prompts)) == 9  # a run that warms up and two that count, no prompt twice


def test_without_a_command_it_is_latency(bench, runners):
    words = ("--prompt-len", 4, "--new", 2, "--repeat", 1)
    _, plain = bench(*words)
    _, named = bench("latency", *words)
    assert plain.keys() == named.keys()
    table, _ = bench(*words, "--json")
    assert table == []


def test_a_sweep_has_a_row_for_each_batch(bench, runners):
    table, result = bench("latency", "--sweep", "1,2,70", "--prompt-len", 4, "--new", 3, "--repeat", 1)
    assert [row["batch"] for row in result["sweep"]] == [1, 2, 70]
    assert all(row[key] > 0 for row in result["sweep"] for key in (*RATES, *SHARES))
    assert len(table) == 3 + 3
    assert max(len(batch.seq_lens) for batch in runners[0].batches) == 70  # no queue: all at once


def test_a_step_is_timed_while_all_decode(bench, runners):
    """Eight prompts, of which a step takes two: with equal lengths the first would be gone when the last decodes."""
    words = ("--prompt-len", 4, "--batch", 8, "--max-num-seqs", 8, "--max-num-batched-tokens", 8, "--repeat", 1)
    _, result = bench("latency", *words, "--new", 40)
    assert result["decode_tokens_per_s"] == pytest.approx(8 / result["step_s"], rel=1e-3)
    sizes = [len(batch.seq_lens) for batch in runners[0].batches]
    before = len(sizes) - 1 - sizes[::-1].index(8)  # of the last run, whose last request ended when all were there
    assert sizes[before - 15 : before + 2] == [8] * 16 + [7]
    table, result = bench("latency", *words, "--new", 3)
    assert result["step_s"] is result["decode_tokens_per_s"] is result["decode_roofline"] is None
    assert table[3].split()[3:6] == ["-", "-", "-"]


def test_an_unknown_matrix_speed_is_said_and_not_guessed(bench, runners, monkeypatch):
    monkeypatch.setattr(device, "ceilings", lambda name, dtype: Ceilings(20e9, None))
    table, result = bench("latency", "--prompt-len", 4, "--new", 2, "--repeat", 1)
    assert [result[key] for key in SHARES[1:]] == [None, None]
    assert "unknown matrix speed" in table[1]


def test_the_default_workload_is_nano_vllms():
    prompts, lengths = workload(256, (100, 1024), (100, 1024), seed=0, vocab_size=151_936)
    assert sum(lengths) == 133_966  # as its README says
    assert (sum(map(len, prompts)), max(map(max, prompts))) == (142_827, 10_000)
    assert min(map(len, prompts)) >= 100 <= min(lengths) and max(map(len, prompts)) <= 1024 >= max(lengths)
    assert max(map(max, workload(9, (5, 9), (1, 2), 0, vocab_size=300)[0])) < 300


def test_throughput_counts_all_tokens(bench, runners):
    words = ("--num-requests", 7, "--prompt-len", "3:9", "--new", "2:6", "--repeat", 2)
    table, result = bench("throughput", *words)
    prompts, lengths = workload(7, (3, 9), (2, 6), 0, 512)
    assert result["input_tokens"] == sum(map(len, prompts)) and result["output_tokens"] == sum(lengths)
    assert result["output_tokens_per_s"] == pytest.approx(sum(lengths) / result["total_s"], rel=1e-3)
    assert result["total_roofline"] > 0 and result["memory_bytes"] > 0 and result["max_num_seqs"] == 7
    assert result["max_ttft_s"] >= result["ttft_s"] > 0
    assert "of the roofline" in table[2]
    assert len({tuple(ids) for ids in runners[0].prefills}) == 21


def test_a_start_is_a_process(bench):
    table, result = bench("startup", "--prompt-len", 8, "--repeat", 1, "--device", "cpu")
    parts = [result[key] for key in ("import_s", "load_s", "first_token_s")]
    assert min(parts) > 0 and sum(parts) < result["startup_s"] < 120
    assert not result["cold"]
    assert "kernels compiled before" in table[0]


def test_a_cold_start_has_caches_of_its_own(bench, monkeypatch, tmp_path):
    """A stand-in for the process tells where it was told to keep things: in an empty place, each time another."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "folders = [os.environ[name] for name in ('MILI_CACHE_DIR', 'MODULAR_CACHE_DIR')]\n"
        "open(sys.argv[0] + '.log', 'a').write(' '.join([*folders, *map(str, map(os.path.exists, folders))]) + '\\n')\n"
        "times = {'import_s': 1, 'load_s': 2, 'first_token_s': 3}\n"
        "print(json.dumps({'model': 'm', 'device': 'd', 'dtype': 't', **times}))\n"
    )
    popen = bench_startup.subprocess.Popen
    monkeypatch.setattr(
        bench_startup.subprocess, "Popen", lambda command, **rest: popen([sys.executable, str(script)], **rest)
    )
    monkeypatch.setenv("MILI_CACHE_DIR", "elsewhere")
    _, result = bench("startup", "--cold", "--repeat", 2)
    lines = [line.split() for line in (tmp_path / "child.py.log").read_text().splitlines()]
    assert result["cold"] and len(lines) == 2
    assert all(line[2:] == ["False", "False"] for line in lines)
    assert len({folder for line in lines for folder in line[:2]}) == 4


def test_memory_speed_and_matrix_speed_are_plausible():
    assert 1e8 < device.cpu_read_bandwidth(num_bytes=2**22, repeats=2) < 1e13
    assert 1e8 < device.cpu_matrix_rate(size=128, repeats=2) < 1e15
    assert 1e7 < device.memory_in_use("cpu") < 1e13
