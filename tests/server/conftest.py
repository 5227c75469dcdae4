"""An application in process over a fake device, and one on a socket over the real bundled model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mili
from mili.async_llm import AsyncLLM
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
        fake_llm.install(monkeypatch, **fields)
        opened.append(Api(AsyncLLM(**{"max_queue": 256, **(llm or {})}), **config))
        return opened[-1]

    yield make
    for api in opened:
        api.llm.close()
        api.__exit__()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    """A model that says something random."""
    return make_api()
