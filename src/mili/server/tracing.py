"""OpenTelemetry: a span for each request to the engine, with the attributes of the GenAI conventions.

A client's `traceparent` becomes the span's parent. The SDK comes with the extra `mili[otel]` and is imported only when
tracing is on. Knows no routes and no HTTP beyond the headers. Invariant: each span that is begun is ended; no prompt
and no output is in any of them.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from mili.errors import ConfigError
from mili.outputs import RequestOutput
from mili.sampling_params import SamplingParams
from mili.server.config import ServerConfig
from mili.server.service import Observer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_OPERATION = "mili.operation"  # key in OpenTelemetry's context


def make_provider(config: ServerConfig) -> "TracerProvider | None":
    """What exports spans to OTEL_EXPORTER_OTLP_ENDPOINT, else to a collector on this machine; None if tracing is off.

    Raises ConfigError if tracing is on and the extra is not installed.
    """
    if not config.tracing and not os.environ.get(_ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        why = "--tracing" if config.tracing else _ENDPOINT
        raise ConfigError(f'{why} asks for tracing, which is not installed: pip install "mili[otel]"') from error
    resource = Resource({"service.name": "mili"}).merge(OTELResourceDetector().detect())  # OTEL_SERVICE_NAME wins
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class TraceContext:
    """Middleware that makes the caller's trace the context of a request's task."""

    def __init__(self, app: ASGIApp) -> None:
        from opentelemetry import context, propagate

        self._app = app
        self._context = context
        self._extract = propagate.extract

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        operation = "chat" if "chat" in scope["path"] else "text_completion"
        token = self._context.attach(self._context.set_value(_OPERATION, operation, self._extract(headers)))
        try:
            await self._app(scope, receive, send)
        finally:
            self._context.detach(token)


class SpanObserver:
    """Makes a span of each request that `following`, the next observer, hears of as well."""

    def __init__(self, provider: "TracerProvider", model_name: str, following: Observer) -> None:
        from opentelemetry import context, trace

        self._tracer = provider.get_tracer("mili")
        self._kind = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR
        self._get_value = context.get_value
        self._model_name = model_name
        self._following = following
        self._spans: dict[str, Span] = {}

    def request_started(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Begin the span."""
        operation = str(self._get_value(_OPERATION) or "text_completion")
        attributes: dict[str, str | int | float] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "mili",
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.choice.count": params.n,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.input_tokens": len(prompt_token_ids),
        }
        if params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = params.max_tokens
        name = f"{operation} {self._model_name}"
        self._spans[request_id] = self._tracer.start_span(name, kind=self._kind, attributes=attributes)
        self._following.request_started(request_id, prompt_token_ids, params)

    def first_token(self, request_id: str, output: RequestOutput) -> None:
        """Nothing for the span: the finished output has this time too."""
        self._following.first_token(request_id, output)

    def finished(self, request_id: str, output: RequestOutput, params: SamplingParams) -> None:
        """End the span with what it came to."""
        span, times = self._spans.pop(request_id), output.metrics
        assert times is not None
        span.set_attributes(
            {
                "gen_ai.response.id": request_id,
                "gen_ai.response.model": self._model_name,
                "gen_ai.response.finish_reasons": [str(completion.finish_reason) for completion in output.outputs],
                "gen_ai.usage.output_tokens": sum(len(completion.token_ids) for completion in output.outputs),
                "gen_ai.usage.cached_tokens": output.num_cached_tokens,
            }
        )
        for name, seconds in (
            ("gen_ai.latency.time_in_queue", times.queue_time),
            ("gen_ai.latency.time_to_first_token", times.time_to_first_token),
            ("gen_ai.latency.e2e", times.finished_time and times.finished_time - times.arrival_time),
        ):
            if seconds is not None:
                span.set_attribute(name, seconds)
        span.end()
        self._following.finished(request_id, output, params)

    def aborted(self, request_id: str, reason: str) -> None:
        """End the span as failed."""
        self._fail(request_id, reason)
        self._following.aborted(request_id, reason)

    def rejected(self, request_id: str, reason: str) -> None:
        """End the span as failed."""
        self._fail(request_id, reason)
        self._following.rejected(request_id, reason)

    def _fail(self, request_id: str, reason: str) -> None:
        span = self._spans.pop(request_id)
        span.set_attribute("error.type", reason)
        span.set_status(self._error)
        span.end()
