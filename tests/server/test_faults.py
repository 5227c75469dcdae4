"""Faults inside and hostile clients outside: only who caused them notices, and nothing stays behind."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from mili.completion import Completion
from mili.grammar import GrammarState
from support.live import serve
from support.load import crowd

PATH = "/v1/completions"
BODY = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
FORM = {**BODY, "ignore_eos": False, "structured_outputs": {"regex": "[a-z]{4}"}}


def at_once(api, *bodies):
    """The answers to requests that share their steps."""

    async def main():
        return await asyncio.gather(*(api._client.post(PATH, json=body) for body in bodies))

    return api.loop.run(main())


def check_idle(api):
    metrics = api.llm.get_metrics()
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_cache_usage_perc"] == 0.0
    assert api.llm.num_unfinished == 0


def test_a_fault_in_the_detokenizer_fails_its_own_request_only(api, monkeypatch):
    alone = api.post(PATH, BODY)["choices"]
    plain = Completion.append

    def broken(self, token_id):
        if self._params.seed == 13 and len(self.token_ids) == 3:
            raise ValueError("secret internals")
        return plain(self, token_id)

    monkeypatch.setattr(Completion, "append", broken)
    answers = at_once(api, BODY, {**BODY, "seed": 13}, BODY)
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert "secret" not in answers[1].text
    assert answers[0].json()["choices"] == answers[2].json()["choices"] == alone
    check_idle(api)


@pytest.mark.parametrize("method", ["append", "digest"])
def test_a_fault_in_the_grammar_engine_fails_its_own_request_only(api, monkeypatch, method):
    alone = api.post(PATH, BODY)["choices"]
    plain, calls = getattr(GrammarState, method), []

    def broken(self, *args):
        calls.append(method)
        if len(calls) == 2:
            raise RuntimeError("secret internals")
        return plain(self, *args)

    monkeypatch.setattr(GrammarState, method, broken)
    answers = at_once(api, BODY, FORM)
    assert [answer.status_code for answer in answers] == [200, 500]
    assert "secret" not in answers[1].text
    assert answers[0].json()["choices"] == alone
    assert api.post(PATH, FORM)["choices"][0]["text"].isalpha(), "the next one is served"
    check_idle(api)


def test_ten_thousand_stop_strings_are_refused_at_once(api):
    stop = [f"never said {number}" for number in range(10_000)]
    started = time.perf_counter()
    error = api.error(PATH, {**BODY, "stop": stop})
    assert error["param"] == "stop"
    assert "got 10000" in error["message"]
    assert time.perf_counter() - started < 2
    assert api.post(PATH, {**BODY, "stop": stop[:1000]})["choices"] == api.post(PATH, BODY)["choices"]


@pytest.mark.parametrize("depth", [100, 1_000, 50_000])
def test_a_deeply_nested_schema_is_refused_or_served_but_never_hangs(api, depth):
    schema = '{"type":"array","items":' * depth + "{}" + "}" * depth
    content = json.dumps(BODY)[:-1] + f',"ignore_eos":false,"structured_outputs":{{"json":{schema}}}}}'
    started = time.perf_counter()
    answer = api.request("POST", PATH, content=content, headers={"content-type": "application/json"})
    assert answer.status_code in ((200, 400) if depth == 100 else (400,)), answer.text[:300]
    assert len(answer.text) < 2000
    assert time.perf_counter() - started < 10
    check_idle(api)


@pytest.fixture(scope="module")
def server():
    with serve("--max-num-seqs", "8", "--read-timeout", "1", "--max-body-bytes", str(4 << 20)) as live:
        yield live


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def head(content_length):
    """The beginning of a POST."""
    lines = (f"POST {PATH} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {content_length}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def read_all(sock):
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def used_pages(server):
    text = httpx.get(f"{server.url}/metrics").text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith("mili:kv_cache_usage_perc{")))


def still_serves(server):
    answer = httpx.post(f"{server.url}{PATH}", json=BODY, timeout=60)
    assert answer.status_code == 200
    deadline = time.monotonic() + 60
    while used_pages(server) > 0.0:
        assert time.monotonic() < deadline, "pages stay in use"
        time.sleep(0.05)


def test_a_body_of_ten_megabytes_is_refused(server):
    answer = httpx.post(f"{server.url}{PATH}", json={**BODY, "prompt": "x" * (10 << 20)}, timeout=60)
    assert answer.status_code == 413
    assert str(4 << 20) in answer.json()["error"]["message"]
    still_serves(server)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_half_open_connection_is_closed(server, sent):
    with connect(server) as sock:
        sock.sendall(sent)
        started = time.monotonic()
        read_all(sock)
        assert 0.5 < time.monotonic() - started < 10
    still_serves(server)


def test_a_body_that_never_comes_is_not_waited_for(server):
    with connect(server) as sock:
        sock.sendall(head(50) + b"{")
        started = time.monotonic()
        assert b" 408 " in read_all(sock)
        assert time.monotonic() - started < 10
    still_serves(server)


def test_invalid_utf8_is_a_400(server):
    answer = httpx.post(
        f"{server.url}{PATH}", content=b'{"prompt": "\xff\xfe"}', headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_slow_reader_neither_blocks_others_nor_holds_pages(server):
    body = json.dumps({**BODY, "max_tokens": 600, "stream": True}).encode()
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        tally = asyncio.run(crowd(server.url, 20, 4, seed=3))
        assert tally.outcomes["finished"] == 20
        still_serves(server)  # the engine is done with the slow reader's request although nothing was read of it
        time.sleep(0.2)
        received = b""
        while b"[DONE]" not in received and (data := sock.recv(2048)):
            received += data
        assert b"data: [DONE]" in received


def test_a_client_that_vanishes_in_mid_stream_frees_its_pages(server):
    body = json.dumps({**BODY, "max_tokens": 1900, "stream": True}).encode()
    socks = []
    for _ in range(6):
        sock = connect(server)
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall(head.encode() + body)
        assert b" 200 " in sock.recv(1024)
        socks.append(sock)
    assert used_pages(server) > 0
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset, not a FIN
        sock.close()
    still_serves(server)
