import io
import json
import re

import pytest

import mili
from mili.cli.main import main
from mili.tokenizer import Tokenizer
from support import fake_llm

COMMANDS = ("generate", "chat", "run-batch", "plan", "bench", "doctor")
BENCHMARKS = ("latency", "throughput", "startup", "serve")


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line; returns (exit code, stdout, stderr)."""

    def run(*words: str, stdin: str | None = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return (end.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def runners(monkeypatch):
    return fake_llm.install(monkeypatch)


@pytest.fixture
def tokenizer():
    return Tokenizer.from_pretrained(mili.__path__[0] + "/data/tiny-qwen3-code")


def says(monkeypatch, tokenizer, text):
    return fake_llm.install(monkeypatch, next_token=fake_llm.saying(tokenizer, text))


# --- generate ---


def test_generate_writes_the_completion(run, monkeypatch, tokenizer):
    says(monkeypatch, tokenizer, " héllo\n  there")
    assert run("generate", "def f():", "-t", 0) == (0, " héllo\n  there\n", "")
    code, out, err = run("generate", "def f():", "-t", 0, "--echo", "--stats")
    assert (code, out) == (0, "def f(): héllo\n  there\n")
    assert "finished by stop" in err


def test_generate_reads_a_file_or_standard_input(run, runners, tmp_path):
    (tmp_path / "prompt.txt").write_text("a b c\n", encoding="utf-8")
    words = ("generate", "-t", 0, "--max-tokens", 4, "--echo")
    from_file = run(*words, "--file", tmp_path / "prompt.txt")
    assert from_file[0] == 0
    assert from_file[1].startswith("a b c\n")
    assert run(*words, stdin="a b c\n") == from_file
    assert run(*words, "--file", "-", stdin="a b c\n") == from_file
    assert run(*words, "a b c\n") == from_file


def test_no_standard_input_and_other_encodings_are_mistakes(run, runners, tmp_path, monkeypatch):
    for command in ("generate", "chat"):
        monkeypatch.setattr("sys.stdin", None)
        with pytest.raises(SystemExit) as end:
            main([command])
        assert end.value.code == 2
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, out, err = run("generate", "--file", tmp_path / "latin.txt")
    assert (code, out) == (2, "")
    assert "latin.txt is not UTF-8 text: unexpected end of data at byte 3." in err


def test_generate_passes_every_option_on(run, runners):
    code, _, err = run(
        *("generate", "x", "--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--min-p", 0.1, "--seed", 3),
        *("--max-tokens", 2, "--min-tokens", 1, "--repetition-penalty", 1.1, "--presence-penalty", 0.2, "--ignore-eos"),
        *("--frequency-penalty", 0.3, "--stop", "qqq", "--max-model-len", 100, "--max-num-seqs", 2, "--dtype"),
        *("float32", "--max-num-batched-tokens", 64, "--block-size", 8, "--kv-cache-memory", "4MiB", "--device", "cpu"),
        *("--no-enable-prefix-caching", "--hf-overrides", '{"rms_norm_eps": 1e-5}', "--enforce-eager"),
        *("--gpu-memory-utilization", 0.5, "--batch-invariant"),
    )
    assert (code, err) == (0, "")
    (runner,) = runners
    assert (runner.page_size, runner.max_model_len, runner.dtype) == (8, 100, "float32")
    assert runner.memory.kv_bytes <= 4 * 2**20
    assert runner.num_steps == 2


def test_generate_stops_at_256_tokens_unless_told(run, runners):
    run("generate", "x", "-t", 0, "--ignore-eos")
    assert runners[0].num_steps == 256


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate",), "no prompt"),
        (("generate", "a", "--file", "b"), "either PROMPT or --file"),
        (("generate", "--file", "no/such/file"), "No such file"),
        (("generate", ""), "prompt is empty"),
        (("generate", "a", "--temperature", "-1"), "temperature"),
        (("generate", "a", "--top-p", "high"), "--top-p"),
        (("generate", "a", "--no-such-option"), "No such option"),
        (("generate", "a", "--model", "no/such/model/here"), "no/such/model/here"),
        (("generate", "a", "--block-size", "3"), "block_size"),
        (("generate", "a", "--kv-cache-memory", "lots"), "not a size"),
        (("generate", "a", "--hf-overrides", "[1]"), "not a JSON object"),
        (("generate", "a", "--hf-overrides", "{"), "not JSON"),
        (("generate", "a", "--min-tokens", "5000", "--max-tokens", "5000"), "min_tokens is 5000"),
        (("plan", "a/b", "--model", "c/d"), "once"),
        (("plan", "no-such-model"), "no-such-model"),
        (("bench", "--prompt-len", "3000", "--new", "8"), "3000.*8.*2048"),
        (("bench", "latency", "--prompt-len", "3000", "--new", "8"), "3000.*8.*2048"),
        (("bench", "latency", "--sweep", "1,x"), "no list of batches"),
        (("bench", "latency", "--sweep", "1,0"), "a batch below 1"),
        (("bench", "throughput", "--new", "3000"), "1024.*3000.*2048"),
        (("bench", "throughput", "--prompt-len", "9:1"), "must not fall"),
        (("bench", "startup", "--cold", "--compiled", "there"), "--cold .* --compiled"),
        (("bench", "startup", "--model", "no/such/model/here", "--repeat", "1"), "no/such/model/here"),
        (("no-such-command",), "No such command"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, runners, words, message):
    code, out, err = run(*words, stdin=Terminal())
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.search(message, err)


def test_traceback_on_request(run, runners):
    code, _, err = run("generate", "", "--traceback")
    assert code == 2
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: the prompt is empty")


def test_faults_of_mili_have_their_own_exit_code(run, monkeypatch):
    fake_llm.install(monkeypatch, fail_at={1})
    code, _, err = run("generate", "a")
    assert code == 1
    assert "RuntimeError: the device is on fire" in err


def test_ctrl_c_is_130(run, monkeypatch):
    fake_llm.install(monkeypatch, fail_at={2}, error=KeyboardInterrupt())
    assert run("generate", "a")[0] == 130


@pytest.mark.parametrize(
    "name", [*(name for name in COMMANDS if name != "bench"), *(f"bench {name}" for name in BENCHMARKS)]
)
def test_help(run, name):
    code, out, _ = run(*name.split(), "--help")
    assert code == 0
    assert f"mili {name}" in out
    assert "--traceback" in out


def test_version_and_bare_command(run):
    assert run("--version")[1] == f"mili, version {mili.__version__}\n"
    code, _, err = run()
    assert code == 2
    assert all(name in err for name in COMMANDS)


# --- chat ---


def test_chat_keeps_the_conversation(run, monkeypatch, tokenizer):
    runners = fake_llm.install(monkeypatch, next_token=lambda ids: tokenizer.eos_token_id if ids[-1] == 65 else 65)
    code, out, err = run("chat", "--system", "Be brief.", "-t", 0, stdin="One\nTwo\n/reset\nThree\n/exit\nFour\n")
    assert (code, out, err) == (0, "b\nb\nb\n", "")
    prompts = [tokenizer.decode(ids) for ids in runners[0].prefills]
    assert [text.count("<|im_start|>user") for text in prompts] == [1, 2, 1]
    assert "One" in prompts[1] and "Two" in prompts[1]
    assert "Three" in prompts[2] and "One" not in prompts[2]
    assert all("Be brief." in text for text in prompts)


def test_chat_interrupted_keeps_what_was_said(run, monkeypatch, tokenizer):
    runners = fake_llm.install(monkeypatch, next_token=lambda ids: 65, fail_at={3}, error=KeyboardInterrupt())
    code, out, err = run("chat", "-t", 0, "--max-tokens", 3, "--no-thinking", stdin="One\nTwo\n")
    assert (code, out) == (0, "bb\nbbb\n")
    assert "[stopped]" in err
    prompts = [tokenizer.decode(ids) for ids in runners[0].prefills]
    assert "bb<|im_end|>" in prompts[1]
    assert prompts[0].endswith("</think>\n\n")


# --- plan, doctor ---


def test_plan_prints_a_table_or_json(run):
    code, out, _ = run("plan", "--device", "cpu")
    assert code == 0
    assert "weights" in out and "KV cache per token" in out and "4.00 KiB" in out
    facts = json.loads(run("plan", "--json", "--device-memory", "8GiB", "--block-size", 32)[1])
    assert (facts["device"], facts["page_size"], facts["total_bytes"]) == ("gpu", 32, 2**33)


def test_doctor_reports_and_makes_a_token(run, runners):
    code, out, _ = run("doctor")
    assert code == 0
    for word in ("mili", "python", "max", "cpu", "features", "memory", "gpu", "compiled", "hub cache"):
        assert any(line.startswith(word) for line in out.splitlines()), word
    assert out.splitlines()[-1].startswith("token")
    assert len(runners) == 1
    assert run("doctor", "--skip-token")[1].count("\n") == out.count("\n") - 1
