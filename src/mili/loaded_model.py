"""`LoadedModel`: a checkpoint brought up: tokenizer, prompts in its format, and an engine on a device.

What `LLM` and `AsyncLLM` have in common. It makes prompts into token ids; it neither steps the engine nor keeps
requests. Invariant: what it has opened it closes, also when a later part of the start fails.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mili.config import EngineConfig, GenerationDefaults, ModelConfig
from mili.engine import Engine
from mili.errors import ConfigError, MiliError, RequestError
from mili.memory import MemoryPlan
from mili.models.hub import resolve_model
from mili.prompts import Messages, Prompt
from mili.runner import Runner
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer

_RENDER_ARGUMENTS = frozenset(
    ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")
)


class LoadedModel:
    """Owns the engine; for one thread at a time, but for `encode` and `render_chat`, which any thread may call."""

    def __init__(
        self,
        model: str | Path | None,
        config: EngineConfig,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        """Load `model`; arguments and exceptions are those of `LLM`."""
        started = time.perf_counter()
        folder = resolve_model(model, revision)
        self.config = ModelConfig.from_pretrained(folder, hf_overrides)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        recommended: dict[str, Any] = GenerationDefaults.from_pretrained(folder).as_dict()
        try:
            self.default_params = SamplingParams(**recommended)
        except RequestError as error:
            raise ConfigError(f"{folder / 'generation_config.json'}: {error}") from error
        found, self._process = time.perf_counter(), os.getpid()
        runner = Runner(folder, self.config, config)
        try:
            self._engine: Engine | None = Engine(runner, self.tokenizer, self.config, config)
        except BaseException:
            runner.close()
            raise
        self.name: str = folder.name if model is None else str(model)
        self.device: str = "cpu" if runner.device.is_host else f"gpu:{runner.device.id}"
        self.dtype: str = runner.dtype
        self.max_model_len: int = runner.max_model_len
        self.memory: MemoryPlan = runner.memory
        self.startup_seconds = {"tokenizer": found - started, **runner.startup_seconds}  # phase -> seconds

    @property
    def engine(self) -> Engine:
        """The engine; raises MiliError after `close`, and in a process that was forked since the start."""
        if self._engine is None:
            raise MiliError("this LLM is closed: make a new one")
        if os.getpid() != self._process:  # without MAX's threads it would wait for ever
            raise MiliError(
                f"this LLM belongs to process {self._process}, of which this one is a fork: start processes with "
                "multiprocessing's method 'spawn' and make an LLM in each"
            )
        return self._engine

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    def encode(self, prompt: Prompt) -> Prompt:
        """`prompt` with its token ids."""
        if prompt.token_ids is not None:
            return prompt
        assert prompt.text is not None
        return Prompt(prompt.text, self.tokenizer.encode(prompt.text))

    def render_chat(
        self,
        messages: Messages,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of a conversation, as text and ids; the template has put the special tokens into the text.

        The arguments are those of `LLM.chat`. Raises RequestError for a conversation the template cannot render.
        """
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise RequestError(f"chat_template_kwargs must be a dict, got {type(chat_template_kwargs).__name__}")
        variables = dict(chat_template_kwargs or {})
        if reserved := sorted(_RENDER_ARGUMENTS & variables.keys()):
            raise RequestError(f"chat_template_kwargs must not hold {reserved[0]!r}: it has an argument of its own")
        text = self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            **variables,
        )
        return Prompt(text, self.tokenizer.encode(text, add_special_tokens=False))

    def close(self) -> None:
        """End every request and free the device; safe to call again."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            if os.getpid() == self._process:
                engine.close()
