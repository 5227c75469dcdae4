"""A client for the ASGI application in process, and what adds the chunks of a stream up again."""

import asyncio
import json
from typing import Any, Self

import httpx
from fastapi import FastAPI
from starlette.middleware import Middleware

from mili.async_llm import AsyncLLM
from mili.server import chat, completions, models, simple, tokenization
from mili.server.config import ServerConfig
from mili.server.errors import add_error_handlers
from mili.server.middleware import RequestContext
from mili.server.service import Service
from support.fake_runner import FakeRunner


class Recorder:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def request_started(self, request_id: str, prompt_token_ids: Any, params: Any) -> None:
        self.events.append(("started", request_id))

    def first_token(self, request_id: str, output: Any) -> None:
        self.events.append(("first_token", request_id))

    def finished(self, request_id: str, output: Any, params: Any) -> None:
        self.events.append(("finished", request_id))

    def aborted(self, request_id: str, reason: str) -> None:
        self.events.append(("aborted", request_id, reason))

    def rejected(self, request_id: str, reason: str) -> None:
        self.events.append(("rejected", request_id, reason))


def make_app(llm: AsyncLLM, recorder: Recorder, **config: Any) -> FastAPI:
    """The routes and the error handlers under the outermost middleware."""
    service = Service(llm, ServerConfig(**config), recorder)
    app = FastAPI(middleware=[Middleware(RequestContext, paths=frozenset(), sinks=())])
    add_error_handlers(app)
    for module in (chat, completions, models, simple, tokenization):
        app.include_router(module.make_router(service))
    return app


class Api:
    """Calls an application from synchronous tests; a context manager."""

    def __init__(self, llm: AsyncLLM, runners: list[FakeRunner], **config: Any) -> None:
        self.llm = llm
        (self.fake,) = runners
        self.recorder = Recorder()
        self.app = make_app(llm, self.recorder, **config)
        self.loop = asyncio.Runner()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.run(self._client.aclose())
        self.loop.close()

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.loop.run(self._client.request(method, path, **options))

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        """The JSON answer, which must have this status."""
        content = json.dumps(body)  # ASCII, so that a test may send what is not Unicode
        answer = self.request("POST", path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        return answer.json()

    def error(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error that the answer holds, and nothing else."""
        answer = self.post(path, body, status)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"message", "type", "param", "code"}
        return answer["error"]

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events of a stream that ends well."""
        answer = self.request("POST", path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.text)
        assert events.pop() == "[DONE]"
        return events


def events_of(text: str) -> list[Any]:
    """The events of a stream: parsed JSON, or "[DONE]"."""
    frames = text.split("\n\n")
    assert frames.pop() == "", "the last event is cut off"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    datas = [frame.removeprefix("data: ") for frame in frames]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def joined_chat(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices that chat chunks add up to, in the form of the whole answer's."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            message = {"role": None, "content": None, "reasoning": None}
            empty = {"index": part["index"], "message": message, "logprobs": None, "finish_reason": None}
            choice = choices.setdefault(part["index"], empty)
            assert choice["finish_reason"] is None, "a chunk after the end"
            _add_delta(choice["message"], part["delta"])
            if part.get("logprobs"):
                choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if "token_ids" in part:
                choice.setdefault("token_ids", []).extend(part["token_ids"])
            choice["finish_reason"] = part["finish_reason"]
            if "stop_reason" in part:
                choice["stop_reason"] = part["stop_reason"]
    for choice in choices.values():
        choice["message"]["content"] = choice["message"]["content"] or None  # the first chunk's is empty
    return choices


def joined_completions(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices that completion chunks add up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            if part["index"] not in choices:
                choices[part["index"]] = part
                continue
            choice = choices[part["index"]]
            assert choice["finish_reason"] is None, "a chunk after the end"
            choice["text"] += part["text"]
            for name, values in (part["logprobs"] or {}).items():
                choice["logprobs"][name] += values
            if "token_ids" in part:
                choice["token_ids"] += part["token_ids"]
            choice |= {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
    return choices


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name in ("role", "content", "reasoning", "reasoning_content"):
        if name in delta:
            message[name] = (message.get(name) or "") + delta[name]
    for part in delta.get("tool_calls", ()):
        calls = message.setdefault("tool_calls", [])
        if part["index"] == len(calls):
            calls.append({"id": part["id"], "type": part["type"], "function": dict(part["function"])})
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
