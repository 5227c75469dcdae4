"""Probes: what each says in every state of the server, and that what is shown holds neither keys nor paths."""

import asyncio
import math
import time
from pathlib import Path

import pytest

import mili
from mili.server.health import Readiness
from support.server import COMPLETIONS, Gate, application

ALIVE, READY = ("/health", "/ping", "/v2/health/live"), ("/ready", "/v2/health/ready")


def states(served):
    """What the probes say: the code of the error, or None for 200."""
    said = []
    for paths in (ALIVE, READY):
        answers = [served.get(path) for path in paths]
        assert len({(answer.status_code, answer.text) for answer in answers}) == 1, "aliases agree"
        assert answers[0].status_code in (200, 503)
        said.append(None if answers[0].status_code == 200 else answers[0].json()["error"]["code"])
    assert served.metric("engine_ready") == (said[1] is None)
    return said


def test_a_started_server_is_alive_and_ready(monkeypatch):
    with application(monkeypatch) as served:
        assert states(served) == [None, None]


def test_the_start_makes_a_token(monkeypatch):
    with application(monkeypatch) as served:
        assert served.llm.get_metrics()["generation_tokens_total"] == 1


def test_a_server_that_made_no_token_is_alive_but_not_ready(monkeypatch):
    with application(monkeypatch) as served:
        readiness = Readiness(served.llm, served.operation.drain, 30.0)
        readiness.check_alive()
        assert not readiness.ready
        served.loop.run(readiness.make_token())
        assert readiness.ready


def test_a_server_that_cannot_make_a_token_does_not_start(monkeypatch):
    broken = application(monkeypatch, runner={"fail_at": {1}, "error": RuntimeError("no kernel")})
    with pytest.raises(RuntimeError, match="no kernel"), broken:
        raise AssertionError("it started")


def test_a_draining_server_is_alive_but_not_ready_and_refuses(monkeypatch):
    with application(monkeypatch) as served:
        served.operation.drain.start()
        assert states(served) == [None, "draining"]
        refused = served.complete(503)
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        assert served.get("/metrics").status_code == served.get("/").status_code == 200


def test_a_stalled_step_loop_is_alive_but_not_ready(monkeypatch):
    gate = Gate()
    with application(monkeypatch, runner={"next_token": gate}, stall_timeout=0.3) as served:

        async def stall():
            gate.opened.clear()
            post = asyncio.create_task(served.client.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 2}))
            at_once = await served.client.get("/ready")
            deadline = time.monotonic() + 10
            while (late := await served.client.get("/ready")).status_code == 200:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            alive = await served.client.get("/health")
            gate.opened.set()
            assert (await post).status_code == 200
            return at_once, late, alive

        at_once, late, alive = served.loop.run(stall())
        assert (at_once.status_code, late.status_code, alive.status_code) == (200, 503, 200)
        assert late.json()["error"]["code"] == "stalled"
        assert states(served) == [None, None]


def test_a_server_that_idles_for_long_is_not_stalled(monkeypatch):
    with application(monkeypatch, stall_timeout=0.2) as served:
        time.sleep(0.4)
        assert states(served) == [None, None]


def test_a_dead_engine_is_neither_alive_nor_ready(monkeypatch):
    error = RuntimeError("/srv/secret/device")
    with application(monkeypatch, runner={"fail_at": set(range(2, 100)), "error": error}) as served:
        while served.get("/health").status_code == 200:
            assert served.request("POST", COMPLETIONS, json={"prompt": "a"}).status_code in (500, 503)
        assert states(served) == ["engine_dead", "engine_dead"]
        message = served.get("/health").json()["error"]["message"]
        assert "RuntimeError" in message
        assert "/srv" not in message
        assert served.get("/metrics").status_code == 200


def test_a_closed_engine_says_so(monkeypatch):
    with application(monkeypatch) as served:
        served.llm.close()
        assert "closed" in served.get("/ready").json()["error"]["message"]


def test_version(monkeypatch):
    with application(monkeypatch) as served:
        assert served.get("/version").json() == {"version": mili.__version__}


@pytest.mark.parametrize(("rate", "shown"), [(None, 500.0), (70.0, 70.0), (math.inf, None)])
def test_server_info_shows_the_event_rate_in_effect(monkeypatch, rate, shown):
    with application(monkeypatch, llm={"max_event_rate": rate}, max_event_rate=rate) as served:
        info = served.get("/server_info").json()
        assert info["max_event_rate"] == shown
        assert "max_event_rate" not in info["server"]


def test_server_info_shows_the_settings_in_effect_without_secrets(monkeypatch, tmp_path):
    folder = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"
    with application(
        monkeypatch, llm={"model": str(folder), "max_num_seqs": 7}, max_queue=11, api_keys=("sk-secret",)
    ) as served:
        answer = served.get("/server_info", headers={"x-api-key": "sk-secret"})
        info = answer.json()
        assert info["model"] == "tiny-qwen3-code"
        assert info["max_num_seqs"] == 7
        assert info["server"]["max_queue"] == 11
        assert info["memory"]["num_pages"] == served.llm.memory.num_pages
        assert info["startup_seconds"].keys() == served.llm.startup_seconds.keys()
        assert "sk-secret" not in answer.text
        assert str(folder.parent) not in answer.text
