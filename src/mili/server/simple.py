"""POST /generate: the smallest way to ask for text.

Invariant: the texts of a stream's events join to the `generated_text` of the same request without streaming.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from mili.outputs import RequestOutput
from mili.sampling_params import SamplingParams
from mili.server.concurrency import until_disconnected
from mili.server.json_text import json_bytes
from mili.server.protocol_completions import GenerateRequest
from mili.server.protocol_responses import Generated
from mili.server.routing import BodyRoute, documented, json_response, request_id_of, usage_of
from mili.server.service import Service, off_loop
from mili.server.sse import EventStream


def make_router(service: Service) -> APIRouter:
    """The route, bound to `service`."""
    router = APIRouter(route_class=BodyRoute)

    @router.post("/generate", response_model=None, responses=documented(Generated, streams=True))
    async def generate(request: Request, body: GenerateRequest) -> Response:
        """Continue a text; the answer is an object with the text in `generated_text`, or a stream of them."""
        given = body.model_dump(exclude={"prompt", "stream"}, exclude_none=True)
        params = replace(service.llm.get_default_sampling_params(), **given)
        token_ids = await off_loop(len(body.prompt), service.llm.get_tokenizer().encode, body.prompt)
        await service.check(token_ids, params)
        if body.stream:
            return EventStream(_events(service, token_ids, params, request_id_of(request)))
        work = service.complete(token_ids, params, request_id_of(request))
        output = await until_disconnected(request.receive, work)
        return json_response(_answer(output, output.text))

    return router


def _answer(output: RequestOutput, text: str) -> Generated:
    reason = output.outputs[0].finish_reason
    return {"generated_text": text, "finish_reason": reason, "usage": usage_of([output]) if output.finished else None}


async def _events(
    service: Service, token_ids: list[int], params: SamplingParams, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Each event has the text since the one before; the last has the finish reason and the usage."""
    async with aclosing(service.stream(token_ids, params, request_id)) as outputs:
        async for output in outputs:
            if output.delta or output.finished:
                yield b"data: " + json_bytes(_answer(output, output.delta)) + b"\n\n"
