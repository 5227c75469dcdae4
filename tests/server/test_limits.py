"""Sizes, types and times of requests, on the wire: what hostile or clumsy clients send to a real socket."""

import asyncio
import contextlib
import json
import socket
import time

import pytest

from mili.errors import ConfigError
from mili.server.config import ServerConfig
from mili.server.connection import bind
from mili.server.limits import RequestLimits
from support.server import BODY, COMPLETIONS, application, exchange, listening

CONFIG = ServerConfig(port=0, max_body_bytes=1000, max_header_bytes=2000, read_timeout=0.6, write_timeout=2.0)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def echo(scope, receive, send):
    """Answers with the size of the body and the number of headers, after the pause that the query gives."""
    message = await receive() if scope["method"] == "POST" else {}
    assert not message.get("more_body", False)
    body = str(len(message.get("body", b""))).encode()
    if scope["query_string"]:
        await asyncio.sleep(float(scope["query_string"]))
    headers = [(b"content-length", str(len(body)).encode()), (b"x-headers", str(len(scope["headers"])).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def limited(app, config):
    return RequestLimits(app, config.max_body_bytes, config.max_header_bytes, config.read_timeout)


@pytest.fixture(scope="module")
def address():
    with listening(limited(echo, CONFIG), CONFIG) as address:
        yield address


def last_answer(received):
    """Status and body of the last of the answers in these bytes."""
    head, _, body = received[received.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def error_code(received, status):
    """The code of the error that the connection ended with."""
    got, body = last_answer(received)
    assert got == status, received
    return json.loads(body)["error"]["code"]


def chunked(*chunks):
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)


# --- the body ---


@pytest.mark.parametrize("size", [0, 1, 999, 1000])
def test_a_body_within_the_limit_arrives_whole(address, size):
    body = b"x" * size
    end = b"Connection: close\r\n"
    counted = exchange(address, POST + end + b"Content-Length: %d\r\n\r\n" % size + body)
    assert last_answer(counted) == (200, b"%d" % size)
    in_chunks = exchange(address, POST + end + b"Transfer-Encoding: chunked\r\n\r\n", chunked(*[b"x"] * size, b""))
    assert last_answer(in_chunks) == (200, b"%d" % size)


def test_a_body_that_announces_too_much_is_refused_before_it_comes(address):
    started = time.monotonic()
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(POST + b"Content-Length: 1001\r\n\r\n")
        assert error_code(sock.recv(65536), 413) == "body_too_large"
    assert time.monotonic() - started < 0.5


def test_a_chunked_body_is_refused_once_it_is_too_long(address):
    body = chunked(*[b"x" * 100] * 11)
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)  # and does not say that this is all
        assert error_code(sock.recv(65536), 413) == "body_too_large"
    with socket.create_connection(address, timeout=20) as sock:
        for _ in range(2):  # a connection whose body was read to its end is kept
            sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body + chunked(b""))
            assert error_code(sock.recv(65536), 413) == "body_too_large"


def test_a_client_that_sends_ten_megabytes_before_it_reads_gets_its_answer(address):
    size = 10 << 20
    received = exchange(address, POST + b"Content-Length: %d\r\n\r\n" % size, b"x" * size)
    assert error_code(received, 413) == "body_too_large"


def test_a_client_that_never_stops_sending_is_cut_off(address):
    sent = 0
    with socket.create_connection(address, timeout=20) as sock, pytest.raises(OSError):
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        while sent < 1 << 30:
            sock.sendall(chunked(b"x" * 65536))
            sent += 65536
    assert sent < 64 << 20


def test_trailers_are_no_headers(address):
    end = (b"0\r\n", b"X-Api-Key: late\r\n\r\n")
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    received = exchange(address, head + chunked(b"x") + b"".join(end))
    assert last_answer(received) == (200, b"1")
    assert b"x-headers: 4\r\n" in received


def test_trailers_without_end_are_cut_off(address):
    sent = 0
    with socket.create_connection(address, timeout=20) as sock, pytest.raises(OSError):
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        while sent < 1 << 30:
            sock.sendall(b"A: " + b"b" * 65536 + b"\r\n")
            sent += 65536
    assert sent < 128 << 20


def test_expect_100_continue_is_answered_with_the_refusal(address):
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(POST + b"Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: application/json", 200),
        ("Content-Type: application/json; charset=utf-8", 200),
        ("Content-Type: Application/JSON", 200),
        ("Content-Type: application/json\r\nContent-Encoding: identity", 200),
        ("Content-Type: application/json\r\nContent-Encoding: gzip", 415),
        ("Content-Type: text/plain", 415),
        ("Content-Type: application/x-www-form-urlencoded", 415),
        ("Content-Type: multipart/form-data; boundary=x", 415),
        ("Content-Type: application/jsonp", 415),
        ("Accept: */*", 415),
    ],
)
def test_only_json_is_read(address, headers, status):
    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\nContent-Length: 2\r\n\r\n{{}}"
    assert last_answer(exchange(address, head.encode()))[0] == status


# --- headers ---


def test_headers_that_are_too_large_are_a_431(address):
    just_right = b"GET / HTTP/1.1\r\nConnection: close\r\nA: %b\r\n\r\n" % (b"x" * 1900)
    assert last_answer(exchange(address, just_right))[0] == 200
    received = exchange(address, b"GET / HTTP/1.1\r\nConnection: close\r\nA: %b\r\n\r\n" % (b"x" * 2000))
    assert error_code(received, 431) == "headers_too_large"


@pytest.mark.parametrize("line", [b"A: b\r\n", b"x" * 8])
def test_headers_without_end_are_a_431(address, line):
    """As many lines, and as one."""
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nA: ")
        received = b""
        with pytest.raises(OSError):  # it goes on sending until the connection is closed
            while True:
                sock.sendall(line * 1000)
                sock.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    received += sock.recv(65536)
                sock.settimeout(20)
    assert error_code(received, 431) == "headers_too_large"


def test_a_long_query_counts_as_headers(address):
    received = exchange(address, b"GET /?%b HTTP/1.1\r\nConnection: close\r\n\r\n" % (b"0" * 3000))
    assert error_code(received, 431) == "headers_too_large"


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n"])
def test_what_is_not_http_is_a_400(address, sent):
    assert error_code(exchange(address, sent), 400) == "bad_request"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",  # request smuggling
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: -1",
        b"Content-Length: 1e3",
        b"Transfer-Encoding: chunked, identity",
    ],
)
def test_ambiguous_lengths_are_a_400(address, headers):
    assert last_answer(exchange(address, POST + headers + b"\r\n\r\n0\r\n\r\n"))[0] == 400


# --- time ---


def closed_after(address, *parts, pause=0.0):
    started = time.monotonic()
    received = exchange(address, *parts, pause=pause)
    return time.monotonic() - started, received


def test_a_connection_that_says_nothing_is_closed(address):
    seconds, received = closed_after(address)
    assert 0.5 < seconds < 3
    assert received == b""


def test_headers_that_trickle_in_are_a_408(address):
    """Slow loris: every byte comes soon after the last one, the request never."""
    started = time.monotonic()
    with socket.create_connection(address, timeout=20) as sock:
        received = b""
        sock.settimeout(0.05)
        for byte in GET[:-2] * 100:
            try:
                sock.sendall(bytes([byte]))
                received += sock.recv(65536)
            except TimeoutError:
                continue
            break
    assert 0.5 < time.monotonic() - started < 3
    assert error_code(received, 408) == "request_timeout"


def test_a_body_that_trickles_in_is_a_408(address):
    head = POST + b"Content-Length: 900\r\n\r\n"
    started = time.monotonic()
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(head)
        received = b""
        sock.settimeout(0.05)
        for _ in range(100):
            try:
                sock.sendall(b"x")
                received += sock.recv(65536)
            except TimeoutError:
                continue
            break
    assert 0.5 < time.monotonic() - started < 3
    assert error_code(received, 408) == "request_timeout"


def test_a_kept_connection_is_closed_when_it_is_not_used(address):
    seconds, received = closed_after(address, GET)
    assert last_answer(received) == (200, b"0")
    assert 0.8 < seconds < 5, "listening() keeps connections for a second"


def test_a_second_request_on_a_connection_has_its_own_time(address):
    with socket.create_connection(address, timeout=20) as sock:
        for _ in range(3):
            sock.sendall(GET)
            assert last_answer(sock.recv(65536)) == (200, b"0")
            time.sleep(0.5)
        started = time.monotonic()
        sock.sendall(GET[:10])
        assert error_code(sock.recv(65536), 408) == "request_timeout"
        assert 0.5 < time.monotonic() - started < 3


def test_an_answer_may_take_longer_than_a_request(address):
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(GET.replace(b"/ ", b"/?1.5 "))
        assert last_answer(sock.recv(65536)) == (200, b"0")


def test_a_request_begun_during_an_answer_does_not_cut_it_off(address):
    with socket.create_connection(address, timeout=20) as sock:
        sock.sendall(GET.replace(b"/ ", b"/?1.5 ") + GET[:10])
        assert last_answer(sock.recv(65536)) == (200, b"0")
        sock.sendall(GET[10:])
        assert last_answer(sock.recv(65536)) == (200, b"0")


def test_a_reader_that_takes_nothing_is_given_up():
    ended = []

    async def flood(scope, receive, send):
        """Sends until the client is gone, which `receive` tells."""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.ensure_future(receive())
        started = time.monotonic()
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        ended.append(time.monotonic() - started)

    with listening(flood, CONFIG) as address, socket.create_connection(address, timeout=20) as sock:
        sock.sendall(GET)
        deadline = time.monotonic() + 20
        while not ended:
            assert time.monotonic() < deadline, "the server still holds the connection"
            time.sleep(0.05)
    assert ended[0] > 1.5


def test_a_port_in_use_is_found_before_anything_is_loaded():
    with bind(CONFIG) as first:
        first.listen()
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{first.getsockname()[1]}: "):
            bind(ServerConfig(port=first.getsockname()[1]))


# --- the application ---


def test_a_full_queue_is_a_429_that_says_when_to_come_back(monkeypatch):
    with application(monkeypatch, llm={"max_num_seqs": 1}, max_queue=1) as served:

        async def crowd():
            posts = [served.client.post(COMPLETIONS, json={**BODY, "max_tokens": 50}) for _ in range(6)]
            return await asyncio.gather(*posts)

        answers = served.loop.run(crowd())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert sorted({answer.status_code for answer in answers}) == [200, 429]
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)
        assert served.metric("admission_rejections_total", reason="queue_full") == len(refused)
        assert served.metric("request_success_total", finished_reason="length") == 6 - len(refused)
        served.complete()


def test_what_is_refused_at_the_door_never_reaches_the_engine(monkeypatch):
    with application(monkeypatch, max_body_bytes=500) as served:
        before = served.llm.get_metrics()
        assert served.complete(413, prompt="x" * 600).json()["error"]["code"] == "body_too_large"
        for content_type in ("text/plain", "application/x-www-form-urlencoded"):
            answer = served.request("POST", COMPLETIONS, content="{}", headers={"content-type": content_type})
            assert answer.status_code == 415
        assert served.get("/health", headers={"a": "x" * 40_000}).status_code == 431
        assert served.llm.get_metrics() == before


def test_an_error_shows_no_internals(monkeypatch):
    secret = "/srv/secret/weights"
    with application(monkeypatch, runner={"fail_at": {2}, "error": RuntimeError(secret)}) as served:
        answer = served.complete(500)
        assert secret not in answer.text
        assert answer.json()["error"]["type"] == "internal_server_error"
        served.complete()
