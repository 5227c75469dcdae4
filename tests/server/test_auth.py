"""API keys: who gets in, what stays open, and that a key shows up nowhere."""

import logging

import pytest

from mili.errors import ConfigError
from mili.server.config import ServerConfig, read_keys
from support.server import application

KEY, OTHER = "sk-first-0123456789", "sk-second-987654321"


@pytest.fixture
def served(monkeypatch):
    with application(monkeypatch, api_keys=(KEY, OTHER)) as served:
        yield served


@pytest.mark.parametrize("key", [KEY, OTHER])
@pytest.mark.parametrize("form", ["Bearer", "bearer", "x-api-key"])
def test_each_key_opens_in_each_form(served, key, form):
    headers = {"x-api-key": key} if form == "x-api-key" else {"authorization": f"{form} {key}"}
    assert served.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY},{OTHER}"},
        {"authorization": "Bearer \xe4"},
        {"x-api-key": ""},
        {"x-api-key": KEY[1:]},
    ],
)
def test_anything_else_is_a_401_that_says_what_to_send(served, headers):
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/nothing/here")):
        answer = served.request(method, path, headers=raw)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert "x-api-key" in answer.json()["error"]["message"]


def test_probes_metrics_and_the_page_are_open_and_nothing_else(served):
    for path in ("/health", "/ready", "/metrics", "/", "/ping", "/v2/health/live", "/v2/health/ready"):
        assert served.get(path).status_code == 200, path
    paths = {path for path in served.app.openapi()["paths"] if "{" not in path}
    for path in paths - {"/health", "/ready", "/metrics", "/"} | {"/openapi.json", "/v1/models/x", "/health/"}:
        assert served.get(path).status_code == 401, path


def test_without_keys_everything_is_open(monkeypatch):
    with application(monkeypatch) as served:
        assert served.get("/v1/models").status_code == 200


def test_a_key_is_in_no_answer_log_or_representation(served, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": f"Bearer {KEY}"}
    texts = [served.get(path, headers=headers).text for path in ("/server_info", "/metrics", "/openapi.json")]
    texts += [served.get("/v1/models", headers={"x-api-key": f"{KEY}x"}).text, repr(served.operation.config)]
    assert not any(key in text for key in (KEY, OTHER) for text in [*texts, caplog.text])
    assert served.get("/server_info", headers=headers).json()["server"]["num_api_keys"] == 2


def test_a_browser_may_ask_before_it_has_a_key(monkeypatch):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with application(monkeypatch, api_keys=(KEY,), allowed_origins=("https://a.example",)) as served:
        answer = served.request("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        refused = served.get("/v1/models", headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example", "pages can read the error"
        other = served.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_no_origin_is_allowed_unless_asked_for(served):
    answer = served.get("/health", headers={"origin": "https://a.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_keys_are_read_from_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# made today\n\n  {KEY}  \n{OTHER}\n")
    assert read_keys(file) == (KEY, OTHER)


def test_a_file_without_keys_does_not_open_the_server(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(file)


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "schl\u00fcssel"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ConfigError, match="API key"):
        ServerConfig(api_keys=(KEY, key))
