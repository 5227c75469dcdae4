"""OpenTelemetry spans: one for each request to the engine, ended whatever happens, and no text in any of them."""

import asyncio
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mili.errors import ConfigError
from mili.server import tracing
from mili.server.config import ServerConfig
from support.server import BODY, COMPLETIONS, application

CHAT = "/v1/chat/completions"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def only(spans):
    (span,) = spans
    return span


def test_a_request_is_a_span_with_the_attributes_of_the_conventions(monkeypatch, provider, exporter):
    with application(monkeypatch, tracing=provider) as served:
        answer = served.complete(max_tokens=7, temperature=0.5, top_p=0.9, n=2)
        usage = answer.json()["usage"]
        span = only(exporter.get_finished_spans())
        assert span.name == "text_completion tiny-qwen3-code"
        assert span.kind is SpanKind.SERVER
        assert span.parent is None
        assert span.status.status_code is StatusCode.UNSET
        found = dict(span.attributes)
        times = [found.pop(f"gen_ai.latency.{name}") for name in ("time_in_queue", "time_to_first_token", "e2e")]
        assert 0 <= times[0] <= times[1] <= times[2] < 10
        assert found == {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "mili",
            "gen_ai.request.model": "tiny-qwen3-code",
            "gen_ai.request.choice.count": 2,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.9,
            "gen_ai.request.max_tokens": 7,
            "gen_ai.response.id": answer.headers["x-request-id"],
            "gen_ai.response.model": "tiny-qwen3-code",
            "gen_ai.response.finish_reasons": ("length", "length"),
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "gen_ai.usage.cached_tokens": 0,
        }
        assert served.metric("request_success_total", finished_reason="length") == 1, "metrics go on"


@pytest.mark.parametrize("stream", [False, True])
def test_the_callers_trace_is_continued(monkeypatch, provider, exporter, stream):
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{span_id}-01"}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": stream}
    with application(monkeypatch, tracing=provider) as served:
        assert served.request("POST", CHAT, json=body, headers=headers).status_code == 200
        served.complete()
        of_chat, of_completion = exporter.get_finished_spans()
        assert of_chat.attributes["gen_ai.operation.name"] == "chat"
        assert f"{of_chat.context.trace_id:032x}" == trace_id
        assert f"{of_chat.parent.span_id:016x}" == span_id
        assert of_completion.context.trace_id != of_chat.context.trace_id, "a trace does not leak into the next request"


def test_a_trace_that_is_not_to_be_sampled_is_not(monkeypatch, provider, exporter):
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}
    with application(monkeypatch, tracing=provider) as served:
        assert served.request("POST", COMPLETIONS, json=BODY, headers=headers).status_code == 200
        assert exporter.get_finished_spans() == ()


def test_a_fault_ends_the_span_as_an_error(monkeypatch, provider, exporter):
    with application(monkeypatch, runner={"fail_at": {2}}, tracing=provider) as served:
        served.complete(500)
        span = only(exporter.get_finished_spans())
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes["error.type"] == "error"
        assert served.metric("request_failure_total", reason="error") == 1


def test_a_refusal_by_the_engine_ends_the_span_as_an_error(monkeypatch, provider, exporter):
    with application(monkeypatch, tracing=provider, llm={"max_num_seqs": 1}, max_queue=0) as served:

        async def crowd():
            return await asyncio.gather(*(served.client.post(COMPLETIONS, json=BODY) for _ in range(5)))

        refused = sum(answer.status_code == 429 for answer in served.loop.run(crowd()))
        types = [span.attributes.get("error.type") for span in exporter.get_finished_spans()]
        assert len(types) == 5
        assert types.count("queue_full") == refused > 0


def test_a_request_that_is_refused_before_the_engine_has_no_span(monkeypatch, provider, exporter):
    with application(monkeypatch, tracing=provider) as served:
        served.complete(400, n=-1)
        served.get("/health")
        assert exporter.get_finished_spans() == ()


def test_no_text_is_in_a_span(monkeypatch, provider, exporter):
    with application(monkeypatch, tracing=provider, api_keys=("sk-secret",)) as served:
        body = {**BODY, "prompt": "something private"}
        answer = served.request("POST", COMPLETIONS, json=body, headers={"x-api-key": "sk-secret"})
        text = only(exporter.get_finished_spans()).to_json()
        assert "private" not in text
        assert "sk-secret" not in text
        assert answer.json()["choices"][0]["text"] not in text


# --- switching it on ---


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert tracing.make_provider(ServerConfig()) is None


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_flag_or_the_environment_switches_it_on(monkeypatch, by):
    monkeypatch.delenv(ENDPOINT, raising=False)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    if by == "environment":
        monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    provider = tracing.make_provider(ServerConfig(tracing=by == "flag"))
    assert provider is not None
    assert provider.resource.attributes["service.name"] == "ours"
    provider.shutdown()


@pytest.mark.parametrize(("by", "names"), [("flag", "--tracing"), ("environment", ENDPOINT)])
def test_a_missing_extra_is_one_clear_line(monkeypatch, by, names):
    monkeypatch.delenv(ENDPOINT, raising=False)
    if by == "environment":
        monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=rf'{names} .* pip install "mili\[otel\]"'):
        tracing.make_provider(ServerConfig(tracing=by == "flag"))


def test_an_application_without_tracing_does_not_need_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)
    with application(monkeypatch) as served:
        served.complete()
