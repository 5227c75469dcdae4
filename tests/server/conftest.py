"""An application in process over a fake device, and one on a socket over the real bundled model."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import mili
from mili.async_llm import AsyncLLM
from mili.server.app import create_app
from mili.server.config import ServerConfig
from mili.tokenizer import Tokenizer
from support import fake_llm
from support.api import Api

BUNDLED = Path(mili.__file__).parent / "data" / "tiny-qwen3-code"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def make_api(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Iterator[Callable[..., Api]]:
    """Makes applications whose model says a text to every prompt (of one length), or at random."""
    opened: list[Api] = []

    def make(text: str | None = None, *, llm: dict[str, Any] | None = None, **config: Any) -> Api:
        fields = {} if text is None else {"next_token": fake_llm.saying(tokenizer, text)}
        runners = fake_llm.install(monkeypatch, **fields)
        opened.append(Api(AsyncLLM(**{"max_queue": 256, **(llm or {})}), runners, **config))
        return opened[-1]

    yield make
    for api in opened:
        api.llm.close()
        api.__exit__()


@pytest.fixture(scope="session")
def live_llm() -> Iterator[AsyncLLM]:
    """The bundled model on the CPU."""
    llm = AsyncLLM(device="cpu", max_queue=256)
    yield llm
    llm.close()


@pytest.fixture(scope="session")
def live_url(live_llm: AsyncLLM) -> Iterator[str]:
    """Where it is served, by uvicorn on a thread of this process."""
    app = create_app(live_llm, ServerConfig(access_log=False))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, name="uvicorn")
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    yield f"http://{host}:{port}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    """A model that says something random."""
    return make_api()
