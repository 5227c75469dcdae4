"""Prometheus metrics: what happened to requests, what the engine says of itself, and what HTTP saw.

Names are vLLM's after the prefix, times are in seconds, and every series has the label `model_name`. Three sources:
routes report requests (`ServerMetrics` is their observer), every step adds to `StepTotals` on the engine's thread, and
the engine's own totals are read when Prometheus asks. Knows no routes. Invariant: a request that the engine accepted
is counted exactly once in request_success_total, request_aborted_total and request_failure_total together.
"""

from bisect import bisect_left
from collections import Counter as Counted
from collections.abc import Iterator, Sequence
from itertools import accumulate

from fastapi import APIRouter, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from mili.outputs import FinishReason, RequestOutput
from mili.progress import StepStats
from mili.sampling_params import SamplingParams
from mili.server.health import Readiness
from mili.server.middleware import Exchange
from mili.server.service import Service

_SECONDS = (*tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1.0, 2.5, 5.0)), 1000.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_STEP_TOKENS = tuple(2.0**power for power in range(15))
_ENGINE_GAUGES = {
    "num_requests_running": "Completions that take part in steps.",
    "num_requests_waiting": "Completions that wait to be scheduled.",
    "kv_cache_usage_perc": "Share of the KV cache in use, 0 to 1.",
}
_ENGINE_COUNTERS = {
    "prompt_tokens_total": "Tokens of the prompts served.",
    "prompt_tokens_cached_total": "Of these, tokens reused from the prefix cache.",
    "generation_tokens_total": "Tokens generated.",
    "prefix_cache_queries_total": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits_total": "Of these, tokens found.",
    "num_preemptions_total": "Times a completion gave up its pages to be computed again later.",
}


class _Distribution:
    """A histogram with one writer, whose work is a tenth of that for prometheus_client's; any thread may read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, documentation: str, model_name: str) -> HistogramMetricFamily:
        """What has been added so far, in Prometheus' form."""
        limits = [*map(str, self._bounds), "+Inf"]
        buckets = list(zip(limits, accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(name, documentation, labels=["model_name"])
        family.add_metric([model_name], buckets, self._sum)
        return family


class StepTotals:
    """What `AsyncLLM(on_step=...)` reports; costs a step well under a microsecond for each token."""

    def __init__(self) -> None:
        self._num_tokens = _Distribution(_STEP_TOKENS)
        self._inter_token_seconds = _Distribution(_SECONDS)

    def add(self, stats: StepStats) -> None:
        """Take in one step; called on the engine's thread."""
        self._num_tokens.add(stats.num_tokens)
        for seconds, count in Counted(stats.inter_token_seconds).items():  # the same for all that were in the last step
            self._inter_token_seconds.add(seconds, count)

    def families(self, prefix: str, model_name: str) -> Iterator[Metric]:
        """The histograms."""
        yield self._num_tokens.family(f"{prefix}iteration_tokens_total", "Tokens computed in a step.", model_name)
        yield self._inter_token_seconds.family(
            f"{prefix}inter_token_latency_seconds", "From one token of a completion to its next.", model_name
        )


class ServerMetrics(Collector):
    """Counts what routes and middlewares report; the `Observer` of `mili.server.service`."""

    def __init__(self, prefix: str, model_name: str) -> None:
        """Names begin with `prefix` and a colon."""
        self.registry = CollectorRegistry()
        self.prefix = f"{prefix}:"
        self._model_name = model_name
        self._histograms: list[tuple[str, str, _Distribution]] = []  # with name and documentation
        ProcessCollector(registry=self.registry)
        self._success = self._counter("request_success_total", "Requests that ended by themselves.", "finished_reason")
        self._aborted = self._counter("request_aborted_total", "Requests ended early from outside.", "reason")
        self._failed = self._counter("request_failure_total", "Requests lost to a fault of the server.", "reason")
        self._rejected = self._counter("admission_rejections_total", "Requests the engine did not accept.", "reason")
        for counter, values in (
            (self._success, FinishReason),
            (self._aborted, ("disconnect", "shutdown")),
            (self._failed, ("error", "engine_dead")),
            (self._rejected, ("queue_full", "invalid")),
        ):
            for value in values:
                counter.labels(model_name, value)  # present from the start, so that rates begin at 0
        self._success_for = {reason: self._success.labels(model_name, reason) for reason in FinishReason}
        self._http_requests = self._counter("http_requests_total", "HTTP requests.", "method", "path", "status")
        self._http_seconds = Histogram(
            f"{self.prefix}http_request_duration_seconds",
            "From a request's headers to the last byte of its answer.",
            ["model_name", "path"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._http_series: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}  # as few as the labels' values
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Decode time for each later token.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first to the last token.")
        self._inference = self._histogram("request_inference_time_seconds", "From the first step to the last token.")
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._new_tokens = self._histogram("request_generation_tokens", "Tokens made for a request.", _TOKENS)
        self._n = self._histogram("request_params_n", "Completions asked for.", _TOKENS[:6])
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens, where given.", _TOKENS)
        self.registry.register(self)  # with the histograms' names, which no other collector may have then
        self.shutting_down = False  # from when on a request that dies with the engine was ended by us

    def request_started(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Nothing to count yet: the engine may refuse the request."""

    def first_token(self, request_id: str, output: RequestOutput) -> None:
        """Count the time to the first token."""
        assert output.metrics is not None
        if (seconds := output.metrics.time_to_first_token) is not None:
            self._ttft.add(seconds)

    def finished(self, request_id: str, output: RequestOutput, params: SamplingParams) -> None:
        """Count a success with its times and sizes; a request's reason is that of the completion cut shortest."""
        reasons = {completion.finish_reason for completion in output.outputs}
        reason = next(r for r in (FinishReason.ABORT, FinishReason.LENGTH, FinishReason.STOP) if r in reasons)
        self._success_for[reason].inc()
        num_new_tokens = sum(len(completion.token_ids) for completion in output.outputs)
        self._prompt_tokens.add(len(output.prompt_token_ids))
        self._new_tokens.add(num_new_tokens)
        self._n.add(params.n)
        if params.max_tokens is not None:
            self._max_tokens.add(params.max_tokens)
        times = output.metrics
        assert times is not None
        if times.first_scheduled_time is None or times.first_token_time is None or times.finished_time is None:
            return  # aborted before its first token
        self._e2e.add(times.finished_time - times.arrival_time)
        self._queue.add(times.first_scheduled_time - times.arrival_time)
        self._prefill.add(times.first_token_time - times.first_scheduled_time)
        self._decode.add(times.finished_time - times.first_token_time)
        self._inference.add(times.finished_time - times.first_scheduled_time)
        longest = max(len(completion.token_ids) for completion in output.outputs)
        if longest > 1:
            self._per_token.add((times.finished_time - times.first_token_time) / (longest - 1))

    def aborted(self, request_id: str, reason: str) -> None:
        """Count a request that ended early: by its client, by the shutdown, or by a fault."""
        if reason == "engine_dead" and self.shutting_down:
            reason = "shutdown"
        counter = self._failed if reason in ("error", "engine_dead") else self._aborted
        counter.labels(self._model_name, reason).inc()

    def rejected(self, request_id: str, reason: str) -> None:
        """Count a request that the engine did not accept."""
        self._rejected.labels(self._model_name, reason).inc()

    def http_request(self, exchange: Exchange) -> None:
        """Count an HTTP request that has ended."""
        series = (exchange.method_label, exchange.template, exchange.status)
        if (found := self._http_series.get(series)) is None:  # looking them up takes longer than counting
            method, template, status = series
            found = (
                self._http_requests.labels(self._model_name, method, template, str(status)),
                self._http_seconds.labels(self._model_name, template),
            )
            self._http_series[series] = found
        requests, seconds = found
        requests.inc()
        seconds.observe(exchange.seconds)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(self.prefix + name, documentation, ["model_name", *labels], registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """The histograms of requests."""
        for name, documentation, distribution in self._histograms:
            yield distribution.family(name, documentation, self._model_name)

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float] = _SECONDS) -> _Distribution:
        distribution = _Distribution(bounds)
        self._histograms.append((self.prefix + name, documentation, distribution))
        return distribution


class EngineCollector(Collector):
    """Reads the engine when Prometheus asks, so that nothing is copied while nobody does."""

    def __init__(self, service: Service, readiness: Readiness, steps: StepTotals | None, prefix: str) -> None:
        """Take `steps` from the `AsyncLLM` if it was made with them."""
        self._service = service
        self._readiness = readiness
        self._steps = steps
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        """All families, with values as of now."""
        llm, model_name = self._service.llm, self._service.model_name
        values = llm.get_metrics()
        for name, text in _ENGINE_GAUGES.items():
            yield self._gauge(name, text, {}, values[name])
        for name, text in _ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(self._prefix + name, text, labels=["model_name"])
            counter.add_metric([model_name], values[name])  # type: ignore[arg-type]
            yield counter
        yield self._gauge("engine_ready", "1 if /ready says 200.", {}, self._readiness.ready)
        cache = {
            "block_size": llm.memory.page_size,
            "num_gpu_blocks": llm.memory.num_pages - 1,
            "cache_dtype": llm.dtype,
        }
        yield self._gauge("cache_config_info", "The KV cache; vLLM's label names, on the CPU too.", cache, 1)
        startup = GaugeMetricFamily(
            f"{self._prefix}startup_time_seconds", "Phases of the start.", labels=["model_name", "phase"]
        )
        for phase, seconds in llm.startup_seconds.items():
            startup.add_metric([model_name, phase], seconds)
        yield startup
        if self._steps is not None:
            yield from self._steps.families(self._prefix, model_name)

    def _gauge(self, name: str, text: str, labels: dict[str, object], value: object) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(self._prefix + name, text, labels=["model_name", *labels])
        gauge.add_metric([self._service.model_name, *map(str, labels.values())], float(value))  # type: ignore[arg-type]
        return gauge


def make_router(registry: CollectorRegistry) -> APIRouter:
    """`/metrics`."""
    router = APIRouter(tags=["operation"])

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """All metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
