"""POST /v1/chat/completions.

    body ── check ── template ── SamplingParams ──> Service ──> OutputParser ──> message, or chunks (chat_stream.py)

Invariant: a stream's chunks add up to the message that the same request gets without streaming.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from mili.output_parser import Message, OutputParser
from mili.outputs import CompletionOutput, RequestOutput
from mili.sampling_params import SamplingParams
from mili.server.chat_stream import ChatStreamWriter, chat_finish_reason
from mili.server.concurrency import until_disconnected
from mili.server.errors import ApiError, blaming
from mili.server.logprobs import chat_logprobs, prompt_logprobs
from mili.server.protocol_chat import ChatRequest
from mili.server.protocol_responses import AssistantMessage, ChatChoice, ChatCompletion
from mili.server.routing import BodyRoute, documented, json_response, request_id_of, usage_of
from mili.server.service import Service, off_loop
from mili.server.sse import EventStream
from mili.structured_outputs import StructuredOutputsParams
from mili.tool_calls import FunctionTool, ToolChoice, check_tool_choice, check_tools, tool_call_grammar


def make_router(service: Service) -> APIRouter:
    """The route, bound to `service`."""
    router = APIRouter(route_class=BodyRoute)

    @router.post("/v1/chat/completions", response_model=None, responses=documented(ChatCompletion, streams=True))
    async def create_chat_completion(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        body.check_chat()
        tools = body.tool_dicts()
        functions = check_tools(tools)
        choice = check_tool_choice(body.tool_choice, functions)
        if choice.mode == "none":
            tools = None  # the model is not told of what it must not call
        field = body.grammar_field or "tools"
        with blaming(field):
            grammar = _grammar(body, functions, choice)
        params = body.chat_sampling_params(service.llm.get_default_sampling_params(), grammar)
        prompt = await off_loop(
            len(await request.body()),
            service.llm.render_chat,
            body.template_messages(),
            tools=tools,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            chat_template_kwargs=body.chat_template_kwargs,
        )
        assert prompt.token_ids is not None
        with blaming(field):
            await service.check(prompt.token_ids, params)
        call = ChatCall(service, body, params, prompt.token_ids, tools is not None, request_id_of(request))
        if body.stream:
            return EventStream(call.events())
        return json_response(await until_disconnected(request.receive, call.answer()))

    return router


def _grammar(body: ChatRequest, functions: list[FunctionTool], choice: ToolChoice) -> StructuredOutputsParams | None:
    """What the answer must look like, by response format or by tool choice."""
    grammar = body.grammar()
    if choice.mode == "none":
        return grammar
    if grammar is not None:
        message = "tool_choice: an answer under a grammar cannot call tools, set tool_choice to none or leave one out"
        raise ApiError(400, message, param="tool_choice")
    text = tool_call_grammar(functions, choice, body.parallel_tool_calls is not False)
    return None if text is None else StructuredOutputsParams(grammar=text)


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A request that passed all checks."""

    service: Service
    body: ChatRequest
    params: SamplingParams
    prompt_token_ids: list[int]
    parse_tools: bool
    request_id: str

    def parser(self) -> OutputParser:
        """A parser for one of the answers."""
        return OutputParser(
            self.service.llm.get_tokenizer(),
            self.prompt_token_ids,
            parse_tools=self.parse_tools,
            skip_special_tokens=self.params.skip_special_tokens,
        )

    async def answer(self) -> ChatCompletion:
        """The whole answer."""
        output = await self.service.complete(self.prompt_token_ids, self.params, self.request_id)
        parsers = [self.parser() for _ in output.outputs]
        answer: ChatCompletion = {
            "id": f"chatcmpl-{self.request_id}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.service.model_name,
            "choices": [self._choice(*pair) for pair in zip(output.outputs, parsers, strict=True)],
            "usage": usage_of([output], reasoning_tokens=sum(parser.num_reasoning_tokens for parser in parsers)),
        }
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = output.prompt_token_ids
        if output.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return answer

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks."""
        writer = ChatStreamWriter(
            self.service.llm.get_tokenizer(),
            [self.parser() for _ in range(self.params.n)],
            request_id=f"chatcmpl-{self.request_id}",
            model=self.service.model_name,
            num_top_logprobs=self.params.logprobs,
            reasoning_content=self.service.config.reasoning_content,
            token_ids=bool(self.body.return_token_ids),
            usage=self.body.include_usage,
        )
        output: RequestOutput | None = None
        async with aclosing(self.service.stream(self.prompt_token_ids, self.params, self.request_id)) as outputs:
            async for output in outputs:
                if chunks := writer.write(output):
                    yield chunks
        assert output is not None
        if self.body.include_usage:
            yield writer.write_usage(output)

    def _choice(self, completion: CompletionOutput, parser: OutputParser) -> ChatChoice:
        message = Message()
        message.feed(parser.feed(completion.token_ids, len(completion.text), finished=True))
        fields: AssistantMessage = {"role": "assistant", "content": message.content, "reasoning": message.reasoning}
        if self.service.config.reasoning_content:
            fields["reasoning_content"] = message.reasoning
        if message.tool_calls:
            fields["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        logprobs = None
        if completion.logprobs is not None:
            assert self.params.logprobs is not None
            logprobs = chat_logprobs(completion.logprobs, self.params.logprobs, self.service.llm.get_tokenizer())
        choice: ChatChoice = {
            "index": completion.index,
            "message": fields,
            "logprobs": logprobs,
            "finish_reason": chat_finish_reason(completion, bool(message.tool_calls)),
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice
