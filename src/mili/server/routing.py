"""What the generation routes have in common: how requests are numbered, usage, and JSON answers.

Knows outputs and HTTP, no endpoint's shape.
"""

import json
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from mili.outputs import RequestOutput
from mili.server.errors import ErrorBody
from mili.server.json_text import json_bytes
from mili.server.protocol_responses import Usage


class BodyRoute(APIRoute):
    """A route for `endpoint(request, body)`, without what FastAPI does for endpoints that might depend on more.

    Its way takes longer than reading and checking the body itself. A body that does not pass goes that way all the
    same: it says what is wrong with it.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI asks for it."""
        usual = super().get_route_handler()
        endpoint, model = self.endpoint, self.endpoint.__annotations__["body"]

        async def handle(request: Request) -> Response:
            try:
                body = model.model_validate(json.loads(await request.body()))
            except (ValueError, RecursionError):  # of JSON, UTF-8 or the model
                return await usual(request)
            response: Response = await endpoint(request, body)
            return response

        return handle


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
