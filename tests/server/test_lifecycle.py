"""The life of `mili serve` as a process: start, signals, drain, exit codes, death of the engine, and idleness."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from support.live import Live, free_port, serve, wait_ready

PATH = "/v1/completions"
FAULTY = """
import sys, time
from pathlib import Path
from mili.engine import Engine

plain, flag = Engine.step, Path(sys.argv.pop(1))

def step(self, *args):
    if flag.exists():
        {fault}
    return plain(self, *args)

Engine.step = step
from mili.cli.main import main
main()
"""


def body(num_tokens, **fields):
    return {"prompt": "def f(x):", "max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **fields}


def in_flight(live):
    text = httpx.get(f"{live.url}/metrics").text
    names = ("num_requests_running", "num_requests_waiting")
    return sum(float(re.search(rf"^mili:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[1]) for name in names)


async def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def post(client, **fields):
    """Status and text of an answer; the text of a stream is all of its events."""
    answer = await client.post(PATH, json=body(**fields))
    return answer.status_code, answer.text


def client_of(live):
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=live.url, timeout=120, limits=limits)


def is_whole(num_tokens, stream, status, text):
    if not stream:
        return status == 200 and json.loads(text)["usage"]["completion_tokens"] == num_tokens
    return status == 200 and '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_nothing_that_was_accepted(number):
    with serve("--max-num-seqs", "8", "--drain-timeout", "60", exit_code=None) as live:

        async def main():
            async with client_of(live) as client:
                plan = [(100 + 7 * index, index % 2 == 0) for index in range(24)]
                posts = [asyncio.create_task(post(client, num_tokens=n, stream=stream)) for n, stream in plan]
                await wait_until(lambda: in_flight(live) == len(plan))
                live.process.send_signal(number)
                while (ready := await client.get("/ready")).status_code == 200:
                    await asyncio.sleep(0.02)
                refused = await client.post(PATH, json=body(num_tokens=1))
                assert not all(task.done() for task in posts), "the drain is not over"
                return plan, [await task for task in posts], ready, refused

        plan, answers, ready, refused = asyncio.run(main())
        assert [is_whole(*want, *got) for want, got in zip(plan, answers, strict=True)] == [True] * len(plan)
        assert ready.json()["error"]["code"] == "draining"
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0
        assert live.process.wait(10) == 0
        assert "draining: 24 requests are in flight" in live.log()
        assert "aborting" not in live.log()


def test_a_body_that_was_begun_before_the_signal_is_served():
    with serve(exit_code=None) as live:
        content = json.dumps(body(num_tokens=3)).encode()
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as sock:
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
            )
            sock.sendall(f"{head}\r\n\r\n".encode() + content[:10])
            time.sleep(0.3)
            live.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert httpx.get(f"{live.url}/ready").status_code == 503
            sock.sendall(content[10:])
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert live.process.wait(10) == 0


def ended_early(live, *signals):
    """What becomes of two long requests, a stream and none, when the signals come; and the seconds until the exit."""

    async def main():
        async with client_of(live) as client:
            posts = [asyncio.create_task(post(client, num_tokens=1900, stream=stream)) for stream in (False, True)]
            await wait_until(lambda: in_flight(live) == 2)
            started = time.monotonic()
            for number in signals:
                live.process.send_signal(number)
                await asyncio.sleep(0.2)
            answers = [await task for task in posts]
            await asyncio.to_thread(live.process.wait, 30)
            return time.monotonic() - started, answers

    seconds, ((status, text), (stream_status, events)) = asyncio.run(main())
    assert status == 503
    assert json.loads(text)["error"]["type"] == "service_unavailable"
    assert stream_status == 200
    assert '"error"' in events.split("data: ")[-1]
    assert "[DONE]" not in events
    assert live.process.returncode == 0, live.log()
    assert "aborting 2 requests" in live.log()
    return seconds


SLOW_STEP = FAULTY.format(fault="time.sleep(0.05)")  # so that 1900 tokens last


def test_what_outlasts_the_drain_is_aborted_with_an_error(tmp_path):
    with faulty(tmp_path, SLOW_STEP, "--drain-timeout", "1", broken=True) as live:
        assert 1 < ended_early(live, signal.SIGTERM) < 10


def test_a_second_signal_does_not_wait(tmp_path):
    with faulty(tmp_path, SLOW_STEP, "--drain-timeout", "60", broken=True) as live:
        assert ended_early(live, signal.SIGTERM, signal.SIGTERM) < 10


def test_an_answer_that_is_read_slowly_is_read_whole():
    content = json.dumps({"prompt": "a b c d " * 450_000}).encode()  # its answer is larger than all buffers on the way
    with serve(exit_code=None) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
            sock.settimeout(60)
            sock.connect((host, int(port)))
            head = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(content)}", "", "")
            sock.sendall("\r\n".join(("POST /tokenize HTTP/1.1", *head)).encode() + content)
            received = sock.recv(1024)
            live.process.send_signal(signal.SIGTERM)
            time.sleep(3)
            while data := sock.recv(65536):
                received += data
        head, _, answer = received.partition(b"\r\n\r\n")
        assert len(answer) == int(re.search(rb"content-length: (\d+)", head)[1]) > 6 << 20
        assert live.process.wait(10) == 0


def test_unused_connections_do_not_hold_up_the_exit():
    with serve(exit_code=None) as live, httpx.Client(base_url=live.url) as client:
        client.get("/health")  # and keeps the connection
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))):
            started = time.monotonic()
            live.process.send_signal(signal.SIGTERM)
            assert live.process.wait(30) == 0
            assert time.monotonic() - started < 5


def test_a_trace_collector_that_does_not_answer_does_not_hold_up_the_exit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serve(exit_code=None, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as live:
            assert httpx.post(f"{live.url}{PATH}", json=body(num_tokens=2), timeout=60).status_code == 200
            started = time.monotonic()
            live.process.send_signal(signal.SIGTERM)
            assert live.process.wait(30) == 0
            assert time.monotonic() - started < 10


def test_a_signal_while_loading_ends_the_process():
    with process([sys.executable, "-m", "mili", "serve", "--port", str(free_port())]) as live:
        status = Path(f"/proc/{live.pid}/status")
        deadline = time.monotonic() + 30
        while not int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16) & 1 << signal.SIGTERM - 1:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(60) == 0
        assert "Traceback" not in live.log()


# --- the engine ---


@contextmanager
def process(command):
    """A process that is killed at the end, if it is still there."""
    with tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, "MODULAR_TELEMETRY_ENABLED": "0"}
        started = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        url = f"http://127.0.0.1:{command[command.index('--port') + 1]}" if "--port" in command else ""
        try:
            yield Live(url, started, output)
        finally:
            started.kill()
            started.wait()


@contextmanager
def faulty(folder, script, *args, broken=False):
    """A ready server whose steps have a fault once `folder` / "broken" exists."""
    (folder / "faulty.py").write_text(script)
    words = [str(folder / "broken"), "serve", "--port", str(free_port()), *args]
    with process([sys.executable, str(folder / "faulty.py"), *words]) as live:
        wait_ready(live)
        if broken:
            (folder / "broken").touch()
        yield live


@pytest.mark.parametrize("fault", ["raise RuntimeError('/srv/secret')", "raise MemoryError", "sys.exit(0)"])
def test_when_the_engine_dies_health_says_so_and_the_exit_code_is_not_zero(tmp_path, fault):
    with faulty(tmp_path, FAULTY.format(fault=fault)) as live:

        async def main():
            async with client_of(live) as client:
                posts = [asyncio.create_task(post(client, num_tokens=1900, stream=stream)) for stream in (False, True)]
                await wait_until(lambda: in_flight(live) == 2)
                (tmp_path / "broken").touch()
                answers = [await task for task in posts]
                return (
                    answers,
                    await client.get("/health"),
                    await client.get("/ready"),
                    await post(client, num_tokens=1),
                )

        ((status, text), (_, events)), health, ready, late = asyncio.run(main())
        assert (status, late[0], health.status_code, ready.status_code) == (503, 503, 503, 503)
        assert json.loads(text)["error"]["code"] == health.json()["error"]["code"] == "engine_dead"
        assert '"engine_dead"' in events.split("data: ")[-1]
        assert not any("/srv" in said for said in (text, events, health.text, late[1]))
        assert live.process.wait(20) == 1
        assert "Traceback" in live.log()


def test_a_step_that_never_ends_makes_the_server_unready_and_does_not_keep_it_alive(tmp_path):
    stuck = FAULTY.format(fault="time.sleep(1000)")
    with faulty(tmp_path, stuck, "--stall-timeout", "0.5", "--drain-timeout", "1") as live:

        async def main():
            async with client_of(live) as client:
                (tmp_path / "broken").touch()
                task = asyncio.create_task(post(client, num_tokens=5))
                await wait_until(lambda: httpx.get(f"{live.url}/ready").status_code == 503)
                ready = await client.get("/ready")
                assert ready.json()["error"]["code"] == "stalled"
                assert (await client.get("/health")).status_code == 200
                live.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(live.process.wait, 30)
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
        assert live.process.returncode == 0, live.log()
        assert "the engine does not end its step" in live.log()


# --- idleness ---


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_server_takes_less_than_a_hundredth_of_a_core():
    with serve() as live, httpx.Client(base_url=live.url, timeout=60) as client:
        assert client.post(PATH, json=body(num_tokens=50)).status_code == 200  # and the connection stays open
        time.sleep(1)
        before = cpu_seconds(live.pid)
        time.sleep(10)
        used = cpu_seconds(live.pid) - before
        print(f"idle: {used * 100 / 10:.2f}% of a core")
        assert used < 0.1


# --- the command line ---


def run(*args, code=None, **environment):
    command = [sys.executable, *(("-c", code) if code else ("-m", "mili")), *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    return result.returncode, result.stderr


def test_an_address_in_use_is_one_line_and_exit_code_2():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started = time.monotonic()
        status, error = run("serve", "--port", str(port))
        assert status == 2
        assert re.fullmatch(rf"error: cannot listen on 127\.0\.0\.1:{port}: Address already in use\n", error)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "uvloop", "httptools", "prometheus_client"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from mili.cli.main import main; main()"
    status, error = run("serve", code=code)
    assert status == 2
    assert error == f'error: {missing} is not installed: pip install "mili[serve]"\n'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--port", "70000"), "port must be 0 to 65535"),
        (("--api-key", ""), "an API key must be printable ASCII"),
        (("--metrics-prefix", "a-b"), "metrics_prefix"),
        (("--drain-timeout", "-1"), "drain_timeout"),
        (("--max-body-bytes", "much"), "is not a size"),
        (("a", "--model", "b"), "give the model once"),
        (("--log-format", "xml"), "xml"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(args, message):
    status, error = run("serve", *args)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error


def test_help_loads_no_web_framework():
    code = """
import sys
from mili.cli.main import main
try:
    main(["serve", "--help"])
except SystemExit as end:
    assert end.code == 0
print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""
    status, loaded = run(code=code)
    assert status == 0
    assert "mili" in loaded.split()
    assert not {"fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client", "numpy", "max"} & set(
        loaded.split()
    )


def test_settings_of_the_command_line_reach_the_server(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# of the file\nsk-file\n")
    args = (
        "--served-model-name",
        "ours",
        "--log-format",
        "json",
        "--metrics-prefix",
        "vllm",
        "--max-body-bytes",
        "1KiB",
    )
    with serve(*args, "--api-key", "sk-flag", "--api-key-file", str(keys), MILI_API_KEY="sk-environment") as live:
        statuses = {}
        for key in ("sk-file", "sk-flag", "sk-environment", "sk-other"):
            answer = httpx.get(f"{live.url}/v1/models", headers={"authorization": f"Bearer {key}"})
            statuses[key] = answer.status_code
        assert statuses == {"sk-file": 200, "sk-flag": 200, "sk-environment": 200, "sk-other": 401}
        headers = {"x-api-key": "sk-flag"}
        assert httpx.get(f"{live.url}/v1/models/ours", headers=headers).status_code == 200
        assert httpx.post(f"{live.url}{PATH}", json={"prompt": "x" * 2000}, headers=headers).status_code == 413
        assert 'vllm:engine_ready{model_name="ours"} 1.0' in httpx.get(f"{live.url}/metrics").text
        assert "_created{" not in httpx.get(f"{live.url}/metrics").text
        lines = [json.loads(line) for line in live.log().splitlines()]
        access = [line["status"] for line in lines if line["logger"] == "mili.access"]
        assert access == [200, 200, 200, 401, 200, 413]
        assert any(line["message"] == f"serving on {live.url}" for line in lines)
        assert "sk-" not in live.log()
