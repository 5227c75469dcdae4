"""The HTTP side of the Ray Serve application: reads a request's body, has a replica chosen, passes the answer on.

The body must be read here because Serve's proxy chooses a replica before it has one, and the prompt is in the body.
What a path means, and whether a key or a body is acceptable, is the replica's to say; only /metrics asks all of them.
Invariant: a replica gets whole requests within the limits; a slow or endless body never reaches one.
"""

from collections.abc import MutableMapping
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from mili.ray.asgi import Application, HttpRequest, Message, Receive, Send
from mili.ray.metrics import merge
from mili.ray.prefix import prefix_blocks
from mili.server.config import ServerConfig
from mili.server.errors import ApiError
from mili.server.json_text import json_bytes
from mili.server.limits import RequestLimits

# Serve's proxy writes these itself; the replica was given the same request id.
_OF_THE_PROXY = (b"x-request-id", b"date")
_METRICS_SECONDS = 5.0  # for all replicas to answer


@serve.ingress()
class Ingress:
    """The deployment behind Serve's HTTP proxies."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._forwarder = Forwarder(replicas)
        self._config = config

    def __serve_build_asgi_app__(self) -> Application:
        limits = Middleware(
            RequestLimits,
            max_body_bytes=self._config.max_body_bytes,
            max_header_bytes=self._config.max_header_bytes,
            read_timeout=self._config.read_timeout,
        )
        routes = [Route("/metrics", self._forwarder.metrics), Route("/{path:path}", self._forwarder)]
        return Starlette(routes=routes, middleware=[limits])


class Forwarder:
    """An ASGI application that answers through a handle to `Replica`s."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._answer = replicas.options(method_name="handle_http", stream=True)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Let one replica answer."""
        message = await receive()
        if message["type"] != "http.request":
            return  # the client went away
        body = message.get("body", b"")  # all of it: RequestLimits has collected it
        started = streams = False
        answer = self._answer.remote(HttpRequest.from_scope(scope, body, prefix_blocks(body)))
        try:
            async for messages in answer:
                for message in messages:
                    if message["type"] == "http.response.start":
                        started, streams = True, _is_event_stream(message)
                        message["headers"] = [kv for kv in message["headers"] if kv[0].lower() not in _OF_THE_PROXY]
                    await send(message)
        except (RayError, RayServeException) as error:
            if started and not streams:
                raise  # the proxy breaks the connection off, so that half an answer is not taken for a whole one
            api_error = _api_error(error)
            if started:  # in the form of mili.server.sse
                event = b"data: " + json_bytes(api_error.body) + b"\n\n"
                await send({"type": "http.response.body", "body": event, "more_body": False})
            else:
                await api_error.response()(scope, receive, send)
        finally:
            answer.cancel()  # nothing, for one that has ended

    async def metrics(self, request: Any) -> Response:
        """Prometheus metrics of all replicas; the first refusal, if one refuses."""
        response = self._replicas.broadcast("handle_whole", HttpRequest.from_scope(request.scope, b"", ()))
        answers = await response.results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
        texts: dict[str, str] = {}
        content_type = None
        for answer in answers:
            if isinstance(answer, BaseException):  # its health check will tell
                continue
            replica, start, body = answer
            headers = {key.decode().lower(): value.decode() for key, value in start["headers"]}
            if start["status"] != 200:
                return Response(body, start["status"], headers)
            content_type = headers["content-type"]
            texts[replica] = body.decode()
        return Response(merge(texts), media_type=content_type)


def _is_event_stream(start: Message) -> bool:
    return any(key.lower() == b"content-type" and b"event-stream" in value for key, value in start["headers"])


def _api_error(error: Exception) -> ApiError:
    """What the client is told when a replica gave no answer, or not all of it."""
    if isinstance(error, RayTaskError):
        return ApiError(500, "the replica failed to answer: see its log under this request's id", type="server_error")
    message = "the replica that served this request was lost: send the request again"
    headers = {"Retry-After": "1"}
    return ApiError(503, message, type="service_unavailable", code="replica_lost", headers=headers)
