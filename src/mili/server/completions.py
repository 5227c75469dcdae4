"""POST /v1/completions: one prompt or several, as text or token ids, continued as they stand.

Invariant: choice i·n + j is completion j of prompt i, and of several prompts either all are answered or none.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from mili.outputs import RequestOutput
from mili.sampling_params import SamplingParams
from mili.server.completion_choice import CompletionChoiceWriter
from mili.server.concurrency import gather, merge, until_disconnected
from mili.server.errors import ApiError, blaming
from mili.server.json_text import json_bytes, json_text
from mili.server.protocol_completions import CompletionRequest
from mili.server.protocol_responses import TextCompletion
from mili.server.routing import BodyRoute, documented, json_response, request_id_of, usage_of
from mili.server.service import Service, off_loop
from mili.server.sse import EventStream


def make_router(service: Service) -> APIRouter:
    """The route, bound to `service`."""
    router = APIRouter(route_class=BodyRoute)

    @router.post("/v1/completions", response_model=None, responses=documented(TextCompletion, streams=True))
    async def create_completion(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        service.check_model(body.model)
        body.check_completion()
        field = body.grammar_field or "structured_outputs"
        with blaming(field):
            params = body.completion_sampling_params(service.llm.get_default_sampling_params())
        capacity = service.llm.max_num_seqs + service.config.max_queue
        if len(body.prompts) * params.n > capacity:
            message = f"prompt: {len(body.prompts)} prompts with n {params.n} are more than the {capacity} completions"
            raise ApiError(400, f"{message} this server can hold at once", param="prompt")
        prompts = await off_loop(len(await request.body()), _encode, service, body)
        with blaming(field):
            for token_ids, _ in prompts:
                await service.check(token_ids, params)
        call = CompletionCall(service, body, params, prompts, request_id_of(request))
        if body.stream:
            return EventStream(call.events())
        return json_response(await until_disconnected(request.receive, call.answer()))

    return router


def _encode(service: Service, body: CompletionRequest) -> list[tuple[list[int], str]]:
    """Each prompt's token ids, and its text where it is to be echoed."""
    tokenizer = service.llm.get_tokenizer()
    encoded = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            encoded.append((tokenizer.encode(prompt), prompt if body.echo else ""))
        else:
            encoded.append((prompt, tokenizer.decode(prompt) if body.echo else ""))
    return encoded


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A request that passed all checks."""

    service: Service
    body: CompletionRequest
    params: SamplingParams
    prompts: list[tuple[list[int], str]]
    request_id: str

    async def answer(self) -> TextCompletion:
        """The whole answer."""
        outputs = await gather(
            [
                self.service.complete(token_ids, self.params, self._engine_id(index))
                for index, (token_ids, _) in enumerate(self.prompts)
            ]
        )
        answer: TextCompletion = {
            "id": f"cmpl-{self.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.model_name,
            "choices": [],
            "usage": usage_of(outputs, completion_tokens=0 if self.body.echo_only else None),
        }
        for index, output in enumerate(outputs):
            for writer, completion in zip(self._writers(index), output.outputs, strict=True):
                choice = writer.write(output, completion)
                assert choice is not None, "a finished completion is news"
                answer["choices"].append(choice)
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks."""
        same = {
            "id": f"cmpl-{self.request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.service.model_name,
        }
        head = f"data: {json_text(same)[:-1]},"
        end = ',"usage":null}\n\n' if self.body.include_usage else "}\n\n"
        writers = [self._writers(index) for index in range(len(self.prompts))]
        last: dict[int, RequestOutput] = {}
        streams = [
            self.service.stream(token_ids, self.params, self._engine_id(index))
            for index, (token_ids, _) in enumerate(self.prompts)
        ]
        async with aclosing(merge(streams)) as outputs:
            async for index, output in outputs:
                last[index] = output
                pairs = zip(writers[index], output.outputs, strict=True)
                choices = [choice for writer, completion in pairs if (choice := writer.write(output, completion))]
                if choices:
                    yield "".join([f'{head}"choices":[{json_text(choice)}]{end}' for choice in choices]).encode()
        if self.body.include_usage:
            usage = usage_of(list(last.values()), completion_tokens=0 if self.body.echo_only else None)
            yield head.encode() + b'"choices":[],"usage":' + json_bytes(usage) + b"}\n\n"

    def _engine_id(self, index: int) -> str:
        return self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"

    def _writers(self, index: int) -> list[CompletionChoiceWriter]:
        """One for each completion of a prompt."""
        tokenizer, n = self.service.llm.get_tokenizer(), self.params.n
        _, prompt = self.prompts[index]
        return [CompletionChoiceWriter(index * n + i, self.body, self.params, tokenizer, prompt) for i in range(n)]
