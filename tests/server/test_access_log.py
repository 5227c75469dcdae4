"""Log lines: what a request leaves in the log, what it must not, and that a line is one line."""

import asyncio
import io
import json
import logging
import re
import sys
import uuid

import pytest

from mili.server.access_log import JsonFormatter, TextFormatter, configure_logging
from support.server import BODY, COMPLETIONS, application

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(params=[TextFormatter, JsonFormatter])
def lines(request):
    """What mili's loggers write, line by line."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    logger = logging.getLogger("mili")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lambda: stream.getvalue().splitlines()
    logger.setLevel(level)
    logger.removeHandler(handler)


def parsed(line):
    """The fields of an access line in either form."""
    if line.startswith("{"):
        fields = json.loads(line)
        assert re.fullmatch(TIME, fields["time"])
        assert fields["level"] == "info"
        assert fields["logger"] == "mili.access"
        return {name: str(fields[name]) for name in ("client", "method", "path", "status", "request_id")}
    names = ("client", "method", "path", "status", "request_id")
    match = re.fullmatch(rf"{TIME} INFO mili\.access (\S+) (\S+) (\S+) (\d+) \d+\.\d ms (\S+)", line)
    return dict(zip(names, match.groups(), strict=True))


def test_a_request_is_one_line(monkeypatch, lines):
    with application(monkeypatch) as served:
        answer = served.request("POST", COMPLETIONS, json=BODY, headers={"x-request-id": "my-request.1"})
        (line,) = lines()
        assert parsed(line) == {
            **{"client": "127.0.0.1", "method": "POST", "path": COMPLETIONS, "status": "200"},
            "request_id": "my-request.1",
        }
        assert answer.headers["x-request-id"] == "my-request.1"


def test_probes_are_logged_only_when_they_fail(monkeypatch, lines):
    with application(monkeypatch) as served:
        for path in ("/health", "/ready", "/metrics"):
            served.get(path)
        assert lines() == []
        served.operation.drain.start()
        served.get("/ready")
        assert [parsed(line)["status"] for line in lines()] == ["503"]


def test_the_log_can_be_switched_off(monkeypatch, lines):
    with application(monkeypatch, access_log=False) as served:
        served.complete()
        assert lines() == []
        assert served.metric("http_requests_total", method="POST", path=COMPLETIONS, status="200") == 1


def test_nothing_private_is_logged(monkeypatch, lines):
    with application(monkeypatch, api_keys=("sk-secret",)) as served:
        served.request(
            "POST", f"{COMPLETIONS}?token=in-the-query", json={**BODY, "prompt": "a private prompt"},
            headers={"authorization": "Bearer sk-secret", "cookie": "session=1"},
        )  # fmt: skip
        served.get("/v1/models", headers={"authorization": "Bearer wrong-key"})
        text = "\n".join(lines())
        assert [parsed(line)["status"] for line in lines()] == ["200", "401"]
        assert not any(word in text for word in ("sk-secret", "in-the-query", "private", "session", "wrong-key"))


@pytest.mark.parametrize("path", ["/a%0Ab", "/a%0D%0AINFO%20forged", "/%1b[31m", "/\u00fc \u2028", "/%00"])
def test_a_path_cannot_forge_a_line(monkeypatch, lines, path):
    with application(monkeypatch) as served:
        served.get(path)
        (line,) = lines()
        assert parsed(line)["status"] == "404"
        assert line.isascii()
        assert line.isprintable()


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "\u00e9", "<script>", "a,b"])
def test_a_request_id_that_is_not_one_is_replaced(monkeypatch, lines, given):
    with application(monkeypatch) as served:
        answer = served.get("/version", headers={"x-request-id": given.encode("latin-1")})
        request_id = answer.headers["x-request-id"]
        assert uuid.UUID(request_id).hex == request_id
        assert parsed(lines()[-1])["request_id"] == request_id


@pytest.mark.parametrize("status", [200, 400, 401, 404, 415, 503])
def test_every_answer_has_an_id_and_a_date(monkeypatch, status):
    with application(monkeypatch, api_keys=("k",)) as served:
        headers = {} if status == 401 else {"x-api-key": "k"}
        if status == 503:
            served.operation.drain.start()
        if status == 415:
            answer = served.request("POST", COMPLETIONS, content=b"x", headers=headers)
        elif status in (200, 404):
            answer = served.get("/version" if status == 200 else "/nothing", headers=headers)
        else:
            answer = served.request("POST", COMPLETIONS, json={**BODY, "n": -1}, headers=headers)
        assert answer.status_code == status
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["date"].endswith(" GMT")


def test_the_engine_may_be_given_one_request_id_twice(monkeypatch):
    with application(monkeypatch) as served:

        async def both():
            posts = [served.client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "same"}) for _ in range(2)]
            return await asyncio.gather(*posts)

        assert [answer.status_code for answer in served.loop.run(both())] == [200, 200]


def test_an_exception_is_logged_with_its_traceback_under_the_requests_id(monkeypatch, lines):
    error = RuntimeError("the device\nis on fire")
    with application(monkeypatch, runner={"fail_at": {2}, "error": error}) as served:
        request_id = served.complete(500).headers["x-request-id"]
        text = "\n".join(lines())
        assert f"request {request_id} failed" in text
        assert "Traceback" in text
        assert "is on fire" in text
        assert parsed(lines()[-1])["status"] == "500"


def record(message, *args, **more):
    return logging.LogRecord("mili.engine", logging.WARNING, "file.py", 1, message, args, **{"exc_info": None, **more})


def test_json_lines_hold_what_is_asked_of_them():
    try:
        raise ValueError("no\nway")
    except ValueError:
        entry = json.loads(JsonFormatter().format(record("a %s\nb", "line", exc_info=sys.exc_info())))
    assert entry.pop("exception").endswith("ValueError: no\nway")
    assert re.fullmatch(TIME, entry.pop("time"))
    assert entry == {"level": "warning", "logger": "mili.engine", "message": "a line\nb"}


def test_a_text_line_is_one_line():
    line = TextFormatter().format(record("a %s\n\tb\r\nc", "line"))
    assert re.fullmatch(rf"{TIME} WARNING mili\.engine a line b c", line)


def test_every_logger_of_the_process_writes_in_the_format(capsys):
    root, mili = logging.getLogger(), logging.getLogger("mili")
    before = root.handlers[:], root.level, mili.level
    try:
        configure_logging("json")
        logging.getLogger("uvicorn.error").warning("from a library")
        logging.getLogger("uvicorn.error").info("chatter")
        logging.getLogger("mili.engine").info("from us")
        messages = [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()]
        assert messages == ["from a library", "from us"]
    finally:
        logging.captureWarnings(False)
        root.handlers[:], root.level = before[:2]
        mili.setLevel(before[2])
