"""What the generation routes have in common: how requests are numbered, usage, and JSON answers.

Knows outputs and HTTP, no endpoint's shape.
"""

import json
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive, Scope, Send

from mili.outputs import RequestOutput
from mili.server.errors import ErrorBody
from mili.server.json_text import json_bytes
from mili.server.protocol_responses import Usage


class BodyRoute(APIRoute):
    """A route for `endpoint(request, body)`, without what FastAPI does for endpoints that may depend on more.

    That takes several times as long as to read and check a body. A body that does not pass goes FastAPI's way all the
    same, which says what is wrong with it.
    """

    def __init__(self, path: str, endpoint: Callable[..., Coroutine[Any, Any, Response]], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        usual, model = self.app, endpoint.__annotations__["body"]

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            text = await request.body()
            try:
                body = model.model_validate(json.loads(text))
            except (ValueError, RecursionError):  # of JSON, UTF-8 or the model

                async def again() -> Message:
                    return {"type": "http.request", "body": text, "more_body": False}

                await usual(scope, again, send)
            else:
                response = await endpoint(request, body)
                await response(scope, receive, send)

        self.app = app


def documented(answer: type[Any], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a route for the OpenAPI document; whatever is not success is the error envelope."""
    success: dict[str, Any] = {"model": answer, "description": "The answer."}
    if streams:
        success["content"] = {"text/event-stream": {}}
    return {200: success, "default": {"model": ErrorBody, "description": "What went wrong."}}


def request_id_of(request: Request) -> str:
    """The id that the request was given, by its client or by a middleware, else a new one."""
    return getattr(request.state, "request_id", None) or uuid.uuid4().hex


def json_response(value: Mapping[str, Any]) -> Response:
    """`value` as the answer."""
    return Response(json_bytes(value), media_type="application/json")


def usage_of(
    outputs: Sequence[RequestOutput], *, reasoning_tokens: int | None = None, completion_tokens: int | None = None
) -> Usage:
    """Tokens of all prompts and completions; `completion_tokens` replaces the count of those that are not shown."""
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    if completion_tokens is None:
        completion_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    usage: Usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
    if reasoning_tokens is not None:
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return usage
