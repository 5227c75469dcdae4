"""Whatever goes wrong as an HTTP answer: ``{"error": {"message", "type", "param", "code"}}``, always.

Knows which exception means which status code; knows no route. Invariant: what a client reads was written for clients:
text of an exception that is not one of ours goes to the log and never over the wire.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from mili.errors import EngineDeadError, QueueFullError, RequestError
from mili.sampling_params import SamplingParams
from mili.server.json_text import json_bytes, json_text

INVALID = "invalid_request_error"
RETRY_AFTER_SECONDS = 1
_SHOWN_CHARS = 100  # of a wrong value

# What the message of a RequestError may begin with, and then is about.
_PARAMS = frozenset(field.name for field in fields(SamplingParams)) | {
    "messages", "tools", "tool_choice", "response_format", "continue_final_message", "chat_template_kwargs"
}  # fmt: skip


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body: ErrorBody = {"error": {"message": message, "type": type, "param": param, "code": code}}

    def response(self) -> Response:
        """The answer itself."""
        return Response(json_bytes(self.body), self.status, self.headers, media_type="application/json")


class ClientDisconnected(Exception):
    """The client left before its answer began; there is nobody to tell."""


def as_api_error(error: Exception) -> ApiError:
    """What the client is told of `error`."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=_param_of(str(error)))
        case QueueFullError():
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(429, str(error), type="rate_limit_error", code="queue_full", headers=headers)
        case EngineDeadError():
            message = "the engine has stopped, and this server will exit: retry elsewhere or later"
            return ApiError(503, message, type="service_unavailable", code="engine_dead")
    message = "internal error: the server's log says more under this request's id"
    return ApiError(500, message, type="internal_server_error")


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """Let an error about the engine's `structured_outputs` name the field of the body that it was made from."""
    try:
        yield
    except RequestError as error:
        if field == "structured_outputs":
            raise
        raise RequestError(re.sub(r"^structured_outputs(\.\w+)?", field, str(error))) from error


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer with the envelope; what no handler knows is a 500 of the middleware `RequestContext`."""

    async def ours(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        return _from_validation(error).response()

    async def http(request: Request, error: HTTPException) -> Response:
        return _from_http(request, error).response()

    async def disconnected(request: Request, error: ClientDisconnected) -> Response:
        return Response(status_code=499)  # as nginx logs it; nobody reads it

    app.add_exception_handler(RequestValidationError, invalid_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnected, disconnected)  # type: ignore[arg-type]
    for kind in (ApiError, RequestError, QueueFullError, EngineDeadError):
        app.add_exception_handler(kind, ours)


def field_path(loc: Sequence[str | int]) -> str:
    """A place in a JSON body as people write it: messages[0].content."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def _from_validation(error: RequestValidationError) -> ApiError:
    """The first problem of a body; one at a time is what the envelope can carry."""
    problem: dict[str, Any] = error.errors()[0]
    context = problem.get("ctx") or {}
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {context['error']} at character {problem['loc'][-1]}")
    loc = problem["loc"][1:]
    if not loc and problem["type"] == "missing":
        return ApiError(400, "the body is empty: send a JSON object")
    if "field" in context:
        loc = (*loc, context["field"])
    message = problem["msg"].removeprefix("Value error, ")
    if not loc:
        return ApiError(400, "the body must be a JSON object" if problem["type"].startswith("model_") else message)
    if isinstance(problem.get("input"), int | float | str) and "field" not in context:
        message += f", got {json_text(problem['input'])[:_SHOWN_CHARS]}"
    param = field_path(loc)
    return ApiError(400, f"{param}: {message}", param=param)


def _from_http(request: Request, error: HTTPException) -> ApiError:
    """Starlette's own: no such path, method not allowed, a body that cannot be parsed."""
    match error.status_code:
        case 404:
            return ApiError(404, f"there is nothing at {request.url.path}", code="not_found")
        case 405:
            message = f"{request.method} is not allowed at {request.url.path}"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers)
        case status if status >= 500:
            return ApiError(status, str(error.detail), type="internal_server_error", headers=error.headers)
        case status:
            return ApiError(status, str(error.detail), headers=error.headers)


def _param_of(message: str) -> str | None:
    """The field that a RequestError is about; its message begins with it."""
    path = re.match(r"(\w+)(\[\d+\]|\.\w+)*", message)
    return path[0] if path is not None and path[1] in _PARAMS else None
