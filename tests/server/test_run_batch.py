import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mili.batch_file import BatchOutput, read_batch
from mili.errors import ConfigError, EngineDeadError
from mili.run_batch import run_batch
from mili.server.app import create_app
from mili.server.config import ServerConfig
from support.batch_app import BatchApp

ROOT = Path(__file__).resolve().parents[2]


def line(custom_id, /, url="/v1/completions", method="POST", **body):
    return {"custom_id": custom_id, "method": method, "url": url, "body": {"prompt": custom_id, **body}}


def write_lines(path, lines):
    path.write_text("".join(f"{text if isinstance(text, str) else json.dumps(text)}\n" for text in lines))
    return path


def read_lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.fixture
def answer(tmp_path):
    """Runs a batch as the command does; returns the summary and the output's lines."""

    def answer(app, input_path, max_in_flight=4, check_health=lambda: None):
        output_path = tmp_path / "out.jsonl"
        with BatchOutput(input_path, output_path) as output:
            rest = itertools.islice(read_batch(input_path), output.num_done, None)
            run = run_batch(
                *(app, rest, output.write),
                max_in_flight=max_in_flight,
                check_health=check_health,
                on_written=lambda: None,
            )
            summary = asyncio.run(run)
        return summary, read_lines(output_path)

    return answer


# --- what a line becomes ---


def test_answers_come_in_order_whatever_takes_how_long(answer, tmp_path):
    draw = random.Random(0)
    lines = [line(f"c{i}", delay=draw.random() * 0.02) for i in range(100)]
    app = BatchApp()
    summary, output = answer(app, write_lines(tmp_path / "in.jsonl", lines), max_in_flight=8)
    assert [item["custom_id"] for item in output] == [f"c{i}" for i in range(100)]
    assert all(item["response"]["body"]["prompt"] == item["custom_id"] for item in output)
    assert (summary.num_succeeded, summary.num_failed) == (100, 0)
    assert (summary.prompt_tokens, summary.completion_tokens) == (300, 200)
    assert app.most_in_flight == 8
    assert len({item["id"] for item in output}) == 100


def test_an_answer_has_the_form_of_openai(answer, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line("a"), line("b", url="/v1/chat/completions", status=400)])
    _, (good, bad) = answer(BatchApp(), path)
    assert good.keys() == bad.keys() == {"id", "custom_id", "response", "error"}
    assert good["id"].startswith("batch_req_")
    assert good["response"]["status_code"] == 200 and good["response"]["request_id"] == "r-a"
    assert good["error"] is None
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["path"] == "/v1/chat/completions"


BAD_LINES = [
    ("{not json", "invalid_json_line", None),
    ("[1, 2]", "invalid_json_line", None),
    ("[" * 100_000, "invalid_json_line", None),
    ('{"method": "POST"}', "invalid_request", None),
    ({**line("x"), "custom_id": 7}, "invalid_request", None),
    ({"custom_id": "x", "method": "POST", "url": "/v1/completions"}, "invalid_request", "x"),
    ({**line("x"), "priority": 1}, "invalid_request", "x"),
    (line("x", method="GET"), "invalid_method", "x"),
    (line("x", url="/v1/embeddings"), "invalid_url", "x"),
    (line("x", url=["/v1/completions"]), "invalid_url", "x"),
    ({**line("x"), "body": "text"}, "invalid_request", "x"),
    (line("x", stream=True), "invalid_request", "x"),
    (line("first"), "duplicate_custom_id", "first"),
]


@pytest.mark.parametrize(("bad", "code", "custom_id"), BAD_LINES)
def test_a_bad_line_becomes_an_error_line_and_the_others_go_on(answer, tmp_path, bad, code, custom_id):
    path = write_lines(tmp_path / "in.jsonl", [line("first"), bad, line("last")])
    summary, (first, middle, last) = answer(BatchApp(), path)
    assert first["response"]["status_code"] == last["response"]["status_code"] == 200
    assert (middle["response"], middle["error"]["code"], middle["custom_id"]) == (None, code, custom_id)
    assert "line 2" in middle["error"]["message"]
    assert (summary.num_succeeded, summary.num_failed) == (2, 1)


def test_bytes_that_are_no_text_are_a_bad_line_and_blank_lines_are_none(answer, tmp_path):
    path = tmp_path / "in.jsonl"
    good = json.dumps(line("a")).encode()
    path.write_bytes(b"\xff\xfe\n\n  \n" + good)  # and no newline at the end
    summary, output = answer(BatchApp(), path)
    assert [item["custom_id"] for item in output] == [None, "a"]
    assert (summary.num_succeeded, summary.num_failed) == (1, 1)


def test_what_json_can_hold_but_utf8_cannot_comes_back(answer, tmp_path):
    _, (output,) = answer(BatchApp(), write_lines(tmp_path / "in.jsonl", [line("\ud800\u2028é")]))
    assert output["custom_id"] == "\ud800\u2028é"


@pytest.mark.parametrize("body", [{"crash": True}, {"status": 500}])
def test_a_fault_in_one_request_is_that_lines(answer, tmp_path, body):
    path = write_lines(tmp_path / "in.jsonl", [line("a"), line("b", **body), line("c")])
    summary, output = answer(BatchApp(), path)
    assert [item["response"]["status_code"] for item in output] == [200, 500, 200]
    assert "error" in output[1]["response"]["body"]
    assert summary.num_failed == 1


# --- bounds ---


def test_one_slow_line_holds_back_a_bounded_number_of_answers(answer, tmp_path):
    lines = [line("slow", delay=0.3), *(line(f"c{i}") for i in range(200))]
    lines[0]["url"] = "/v1/chat/completions"
    app, begun = BatchApp(), []

    async def watch(scope, receive, send):
        await app(scope, receive, send)
        if scope["path"] == "/v1/chat/completions":
            begun.append(len(app.bodies))

    _, output = answer(watch, write_lines(tmp_path / "in.jsonl", lines), max_in_flight=4)
    assert len(output) == 201
    assert 4 < begun[0] <= 4 * 4 + 1  # more than the slots, far fewer than the file


def test_the_input_is_read_as_it_is_needed(answer, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line(f"c{i}", delay=0.001) for i in range(300)])
    num_read, num_written, ahead = 0, 0, []

    def counted():
        nonlocal num_read
        for item in read_batch(path):
            num_read += 1
            ahead.append(num_read - num_written)
            yield item

    def write(item):
        nonlocal num_written
        num_written += 1

    run = run_batch(BatchApp(), counted(), write, max_in_flight=4, check_health=lambda: None, on_written=lambda: None)
    asyncio.run(run)
    assert num_written == 300
    assert max(ahead) <= 4 * 4 + 2


# --- interruption and resuming ---


def test_a_dead_engine_ends_the_run_and_its_lines_are_asked_again(answer, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line("a"), line("b", status=503), line("c")])

    def check_health():
        raise EngineDeadError("the engine has died")

    with pytest.raises(EngineDeadError):
        answer(BatchApp(), path, 1, check_health)
    assert [item["custom_id"] for item in read_lines(tmp_path / "out.jsonl")] == ["a"]
    app = BatchApp()
    answer(app, path)
    assert [body["prompt"] for body in app.bodies] == ["b", "c"]


@pytest.mark.parametrize("torn", ["", "{", '{"id": "bat', '{"id": "batch_req_0", "custom_id": "c2", "resp'])
def test_a_run_goes_on_after_the_last_whole_line(answer, tmp_path, torn):
    lines = [line("c0"), "{bad", line("c2"), line("c3"), line("c0")]
    path = write_lines(tmp_path / "in.jsonl", lines)
    output_path = tmp_path / "out.jsonl"
    _, whole = answer(BatchApp(), path)
    output_path.write_text("".join(f"{json.dumps(item)}\n" for item in whole[:2]) + torn)
    app = BatchApp()
    summary, resumed = answer(app, path)
    assert resumed[:2] == whole[:2]
    assert [item["custom_id"] for item in resumed] == ["c0", None, "c2", "c3", "c0"]
    assert resumed[4]["error"]["code"] == "duplicate_custom_id"  # of a line that this run did not ask
    assert [body["prompt"] for body in app.bodies] == ["c2", "c3"]
    assert (summary.num_succeeded, summary.num_failed) == (2, 1)


def test_a_last_line_without_its_newline_is_asked_again(answer, tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line("a"), line("b")])
    _, whole = answer(BatchApp(), path)
    (tmp_path / "out.jsonl").write_text("\n".join(json.dumps(item) for item in whole))
    app = BatchApp()
    _, resumed = answer(app, path)
    assert [body["prompt"] for body in app.bodies] == ["b"]
    assert [item["custom_id"] for item in resumed] == ["a", "b"]


@pytest.mark.parametrize(
    "foreign",
    [
        '{"id": "batch_req_0", "custom_id": "other"}\n',
        '{"id": "batch_req_0", "custom_id": "a"}\n{"id": "batch_req_1", "custom_id": "b"}\n',  # more than the input has
        '{"custom_id": "a"}\n',
        "notes of mine\n",
        "notes of mine, with no newline",
        "\n",
    ],
)
def test_an_output_of_something_else_is_refused_and_left_alone(tmp_path, foreign):
    path = write_lines(tmp_path / "in.jsonl", [line("a")])
    output_path = tmp_path / "out.jsonl"
    output_path.write_text(foreign)
    with pytest.raises(ConfigError, match=r"out\.jsonl line \d is no answer .* another output file"):
        BatchOutput(path, output_path)
    assert output_path.read_text() == foreign


def test_the_input_is_never_the_output(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line("a")])
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    for output_path in (path, tmp_path / "link.jsonl"):
        with pytest.raises(ConfigError, match="both input and output"):
            BatchOutput(path, output_path)
    assert path.read_bytes() == before


def test_a_missing_input_makes_no_output(tmp_path):
    with pytest.raises(FileNotFoundError):
        BatchOutput(tmp_path / "gone.jsonl", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_two_runs_do_not_share_an_output(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [line("a")])
    with BatchOutput(path, tmp_path / "out.jsonl"), pytest.raises(ConfigError, match="another run"):
        BatchOutput(path, tmp_path / "out.jsonl")
    with BatchOutput(path, tmp_path / "out.jsonl"):  # the lock ended with the first
        pass


RUN = """
import asyncio, itertools, sys
from pathlib import Path
from mili.batch_file import BatchOutput, read_batch
from mili.run_batch import run_batch
from mili.server.app import create_app
from mili.server.config import ServerConfig
from support.batch_app import BatchApp
paths = Path(sys.argv[1]), Path(sys.argv[2])
with BatchOutput(*paths) as output:
    rest = itertools.islice(read_batch(paths[0]), output.num_done, None)
    asyncio.run(run_batch(BatchApp(), rest, output.write, max_in_flight=4, check_health=print, on_written=int))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_killed_midway_is_finished_by_the_next(tmp_path, how):
    draw = random.Random(how)
    lines = [line(f"c{i}", delay=draw.random() * 0.02) for i in range(200)]
    paths = write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    paths[1].touch()
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'tests')!r}]\n{RUN}"
    command = [sys.executable, "-c", code, *map(str, paths)]
    num_before = 0
    for num_wanted in (20, 100):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while paths[1].read_bytes().count(b"\n") < num_wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(how)
        assert process.wait(30) != 0
        num_now = paths[1].read_bytes().count(b"\n")
        assert num_before < num_wanted <= num_now < 200
        num_before = num_now
    assert subprocess.run(command, timeout=60).returncode == 0
    assert [item["custom_id"] for item in read_lines(paths[1])] == [f"c{i}" for i in range(200)]


# --- the real application ---


def test_the_real_application_answers_and_refuses(live_llm, tmp_path):
    def chat(custom_id, **body):
        body = {"messages": [{"role": "user", "content": f"# {custom_id}"}], "max_tokens": 5, "temperature": 0, **body}
        return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}

    lines = [chat(f"c{i}") for i in range(20)]
    lines[3] = chat("c3", temperature=-1)
    lines[5] = chat("c5", no_such_field=1)
    lines[7] = line("c7", prompt="def f(", max_tokens=4, ignore_eos=True, n=2)
    lines[9] = line("c9", prompt=[1] * 5000)
    lines[11] = chat("c11", model="gpt-unknown")
    lines[13] = "{"
    path = write_lines(tmp_path / "in.jsonl", lines)
    written = []
    run = run_batch(
        *(create_app(live_llm, ServerConfig()), read_batch(path), written.append),
        max_in_flight=8,
        check_health=live_llm.check_health,
        on_written=lambda: None,
    )
    summary = asyncio.run(run)
    codes = {item["custom_id"]: item["response"]["status_code"] for item in written if item["response"]}
    assert [item["custom_id"] for item in written] == [None if i == 13 else f"c{i}" for i in range(20)]
    assert {key: code for key, code in codes.items() if code != 200} == {"c3": 400, "c5": 400, "c9": 400, "c11": 404}
    assert (summary.num_succeeded, summary.num_failed) == (15, 5)
    assert "no_such_field" in written[5]["response"]["body"]["error"]["message"]
    assert written[9]["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert [choice["index"] for choice in written[7]["response"]["body"]["choices"]] == [0, 1]
    assert len({item["response"]["request_id"] for item in written if item["response"]}) == 19
    assert summary.completion_tokens == sum(
        item["response"]["body"]["usage"]["completion_tokens"]
        for item in written
        if item["response"] and item["response"]["status_code"] == 200
    )
    assert live_llm.num_unfinished == 0


def test_the_command_goes_on_after_ctrl_c_with_the_same_answers(tmp_path):
    def command(output_path):
        words = ("run-batch", "-i", path, "-o", output_path, "--max-num-seqs", "2", "--served-model-name", "any-name")
        return [sys.executable, "-m", "mili", *map(str, words), "--device", "cpu"]

    def texts(output_path):
        items = read_lines(output_path)
        assert [item["custom_id"] for item in items] == [f"c{i}" for i in range(41)]
        assert items[20]["response"]["status_code"] == 400
        return [
            item["response"]["body"]["choices"][0]["text"] for item in items if item["response"]["status_code"] == 200
        ]

    lines = [line(f"c{i}", model="any-name", temperature=0, max_tokens=40, ignore_eos=True) for i in range(41)]
    lines[20]["body"]["max_tokens"] = -1
    path = write_lines(tmp_path / "in.jsonl", lines)
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT / "src")}, "text": True, "stderr": subprocess.PIPE}
    output_path = tmp_path / "out.jsonl"
    output_path.touch()
    process = subprocess.Popen(command(output_path), **options)
    deadline = time.monotonic() + 120
    while output_path.read_bytes().count(b"\n") < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "the same command goes on" in err) == (130, True), err
    num_before = len(read_lines(output_path))
    assert 5 <= num_before < 41
    second = subprocess.run(command(output_path), timeout=120, **options)
    assert second.returncode == 0, second.stderr
    assert f"{41 - num_before} lines in" in second.stderr and f"after {num_before} of an earlier run" in second.stderr
    third = subprocess.run(command(output_path), timeout=60, **options)
    assert (third.returncode, third.stderr) == (0, f"{output_path} has all 41 lines already\n")
    whole = subprocess.run(command(tmp_path / "whole.jsonl"), timeout=120, **options)
    assert whole.returncode == 0 and "40 succeeded, 1 failed" in whole.stderr
    assert texts(output_path) == texts(tmp_path / "whole.jsonl")
