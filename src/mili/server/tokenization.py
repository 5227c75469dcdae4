"""POST /tokenize and /detokenize, in vLLM's shapes.

Invariant: the ids of /tokenize are those that the same prompt or messages would generate from.
"""

from fastapi import APIRouter, Request, Response

from mili.server.errors import ApiError
from mili.server.protocol_completions import DetokenizeRequest, TokenizeRequest
from mili.server.protocol_responses import DetokenizedPrompt, Tokens
from mili.server.routing import BodyRoute, documented, json_response
from mili.server.service import Service, off_loop
from mili.tool_calls import check_tools


def make_router(service: Service) -> APIRouter:
    """The routes, bound to `service`."""
    router = APIRouter(route_class=BodyRoute)
    tokenizer = service.llm.get_tokenizer()

    @router.post("/tokenize", response_model=None, responses=documented(Tokens))
    async def tokenize(request: Request, body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of messages in the model's chat format."""
        service.check_model(body.model)
        body.check()
        token_ids = await off_loop(len(await request.body()), _encode, service, body)
        answer: Tokens = {
            "count": len(token_ids),
            "max_model_len": service.llm.max_model_len,
            "tokens": token_ids,
            "token_strs": [tokenizer.token_text(i) for i in token_ids] if body.return_token_strs else None,
        }
        return json_response(answer)

    @router.post("/detokenize", response_model=None, responses=documented(DetokenizedPrompt))
    async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
        """The text of token ids, special tokens included."""
        service.check_model(body.model)
        bad = next((i for i in body.tokens if not 0 <= i < service.llm.model_config.vocab_size), None)
        if bad is not None:
            last = service.llm.model_config.vocab_size - 1
            raise ApiError(400, f"tokens: {bad} is out of range, the model has ids 0 to {last}", param="tokens")
        answer: DetokenizedPrompt = {"prompt": await off_loop(len(body.tokens), tokenizer.decode, body.tokens)}
        return json_response(answer)

    return router


def _encode(service: Service, body: TokenizeRequest) -> list[int]:
    if body.prompt is not None:
        return service.llm.get_tokenizer().encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    assert body.messages is not None
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    check_tools(tools)
    prompt = service.llm.render_chat(
        [message.for_template(f"messages[{index}]") for index, message in enumerate(body.messages)],
        tools=tools or None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=body.chat_template_kwargs,
    )
    assert prompt.token_ids is not None
    return prompt.token_ids
