"""`create_app`: the application, put together from routes, middlewares and what they share.

Knows the order of things and nothing of what they do. Invariant: every path but the open ones asks for a key, if there
are keys, and is refused in a drain.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

import mili
from mili.async_llm import AsyncLLM
from mili.server import chat, completions, health, metrics, models, page, simple, tokenization
from mili.server.access_log import log_exchange
from mili.server.auth import ApiKeyAuth
from mili.server.config import ServerConfig
from mili.server.drain import Drain, DrainGate
from mili.server.errors import add_error_handlers
from mili.server.health import Readiness
from mili.server.limits import RequestLimits
from mili.server.metrics import EngineCollector, ServerMetrics, StepTotals
from mili.server.middleware import OPEN_PATHS, RequestContext
from mili.server.service import Service
from mili.server.tracing import SpanObserver, TraceContext

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


@dataclass(frozen=True, slots=True)
class Operation:
    """What the process around the application works with; `app.state.operation`."""

    llm: AsyncLLM
    config: ServerConfig
    drain: Drain
    metrics: ServerMetrics


def create_app(
    llm: AsyncLLM,
    config: ServerConfig,
    steps: StepTotals | None = None,
    tracing: "TracerProvider | None" = None,
) -> FastAPI:
    """The ASGI application that serves `llm`.

    Args:
        llm: Stays the caller's, who closes it.
        config: Of which the application uses all but what concerns the process: address, drain time, log format.
        steps: What `llm` was made with, `AsyncLLM(on_step=steps.add)`; without it the metrics lack what steps tell.
        tracing: Where spans go; None for no spans.
    """
    model_name = config.model_name(llm.model)
    server_metrics = ServerMetrics(config.metrics_prefix, model_name)
    observer = server_metrics if tracing is None else SpanObserver(tracing, model_name, server_metrics)
    service = Service(llm, config, observer)
    drain = Drain()
    readiness = Readiness(llm, drain, config.stall_timeout)
    collector = EngineCollector(service, readiness, steps, server_metrics.prefix)
    server_metrics.registry.register(collector)

    routers = [module.make_router(service) for module in (chat, completions, simple, tokenization, models)]
    routers += [health.make_router(service, readiness), metrics.make_router(server_metrics.registry)]
    routers.append(page.make_router())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await readiness.make_token()
        yield

    sinks = [server_metrics.http_request]
    if config.access_log:
        sinks.append(log_exchange)
    paths = frozenset(route.path for router in routers for route in router.routes)
    chain = [Middleware(RequestContext, paths=paths, sinks=sinks)]  # outermost first
    if config.allowed_origins:
        chain.append(
            Middleware(
                CORSMiddleware,
                allow_origins=config.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if config.api_keys:
        chain.append(Middleware(ApiKeyAuth, keys=config.api_keys, open_paths=OPEN_PATHS))
    chain.append(Middleware(DrainGate, drain=drain, open_paths=OPEN_PATHS))
    chain.append(
        Middleware(
            RequestLimits,
            max_body_bytes=config.max_body_bytes,
            max_header_bytes=config.max_header_bytes,
            read_timeout=config.read_timeout,
        )
    )
    if tracing is not None:
        chain.append(Middleware(TraceContext))
    app = FastAPI(
        title="mili",
        version=mili.__version__,
        middleware=chain,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
        },  # mili has its own
    )
    add_error_handlers(app)
    # Not by include_router, which looks for a request's route router by router, and twice.
    app.router.routes.extend(route for router in routers for route in router.routes)
    app.state.operation = Operation(llm, config, drain, server_metrics)
    return app
