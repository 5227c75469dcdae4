"""A real `LLM` on a `FakeRunner`: everything but the device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mili.loaded_model
from mili.config import EngineConfig, ModelConfig
from mili.memory import plan_memory
from mili.tokenizer import Tokenizer
from support.fake_runner import FakeRunner


def install(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[FakeRunner]:
    """Let `LLM` make fake runners with these fields; returns the list that they are put into."""
    made: list[FakeRunner] = []

    def make_runner(folder: Path, model: ModelConfig, engine: EngineConfig) -> FakeRunner:
        memory = plan_memory(model, engine, 2**33, 2**33, on_cpu=True)
        runner = FakeRunner(
            num_pages=memory.num_pages,
            page_size=engine.page_size,
            max_model_len=memory.max_model_len,
            vocab_size=model.vocab_size,
            dtype=engine.resolve_dtype(model),
            memory=memory,
            **fields,
        )
        made.append(runner)
        return runner

    monkeypatch.setattr(mili.loaded_model, "Runner", make_runner)
    return made


def saying(tokenizer: Tokenizer, text: str) -> Callable[[list[int]], int]:
    """A `FakeRunner.next_token` that continues the first prompt it sees with `text` and EOS."""
    assert tokenizer.eos_token_id is not None
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    prompt_lens: list[int] = []

    def next_token(token_ids: list[int]) -> int:
        prompt_lens.append(len(token_ids))
        return ids[min(len(token_ids) - prompt_lens[0], len(ids) - 1)]

    return next_token
