"""What the generation routes have in common: how requests are numbered, usage, and JSON answers.

Knows outputs and HTTP, no endpoint's shape.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response

from mili.outputs import RequestOutput
from mili.server.errors import ErrorBody
from mili.server.json_text import json_bytes
from mili.server.protocol_responses import Usage


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
