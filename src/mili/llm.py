"""`LLM`: load a model once, then generate text from Python.

It turns prompts into token ids and outputs into lists; what happens in between is the engine's. Threads take turns.
Invariant: a call either returns outputs for all its prompts or raises and leaves nothing of them in the engine; other
streams that are open at the time go on.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from mili.config import EngineConfig, ModelConfig
from mili.errors import RequestError
from mili.loaded_model import LoadedModel
from mili.memory import MemoryPlan
from mili.outputs import RequestOutput
from mili.plan import ModelPlan, plan_model
from mili.prompts import Messages, Prompt, PromptLike, match_params, parse_conversations, parse_prompts
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer
from mili.turns import Turns


class LLM:
    """A loaded model. Use it as a context manager, or call `close`, to free the device.

    Several threads may call it, one after the other: a call waits until that of another thread is over, or its stream's
    next output there. `AsyncLLM` serves many callers at once.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        batch_invariant: bool = False,
        compiled: str | Path | None = None,
        seed: int = 0,
        hf_overrides: Mapping[str, Any] | None = None,
        revision: str | None = None,
    ) -> None:
        """Load `model`; the first time for a network's shape on a machine this compiles its kernels.

        Args:
            model: A local folder or a Hugging Face name "owner/name"; None is the small model that comes with mili.
            device: "auto" (a GPU if there is one), "cpu", "gpu" or "gpu:N".
            dtype: Of weights, arithmetic's operands and KV cache: "auto" (as the checkpoint), "bfloat16", "float32".
            max_model_len: Most tokens of one request, prompt and output together; None for what the model is made for.
            max_num_seqs: Most requests in one step.
            max_num_batched_tokens: Most tokens in one step; longer prompts are spread over several.
            block_size: Tokens per page of the KV cache, a power of two.
            gpu_memory_utilization: Share of the GPU's memory for weights, temporaries and KV cache together.
            kv_cache_memory_bytes: Size of the KV cache; None for what fits.
            enable_prefix_caching: Reuse the keys and values of prompts that begin alike.
            enforce_eager: Never replay captured device graphs.
            batch_invariant: Give a request the same bits alone, in any batch, in chunks, from the prefix cache and
                after preemption. It costs speed on a GPU; on the CPU it is always so.
            compiled: A folder that `mili compile` wrote: load the kernels from there and compile nothing.
            seed: From which requests without a seed of their own get theirs.
            hf_overrides: Fields that replace those of config.json, for example rope_scaling to switch YaRN on.
            revision: Branch, tag or commit of a Hugging Face model.

        Raises:
            ConfigError: An option, the model's name or its config.json is wrong, or memory does not suffice.
            UnsupportedModelError: The model needs something mili does not have.
            WeightError: A weight file is missing or damaged.
        """
        config = EngineConfig(
            device=device,
            dtype=dtype,
            page_size=block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=enforce_eager,
            batch_invariant=batch_invariant,
            compiled=compiled,
            seed=seed,
        )
        self._loaded = LoadedModel(model, config, hf_overrides, revision)
        self._turns = Turns()
        self._tokenizer = self._loaded.tokenizer
        self._default_params = self._loaded.default_params
        self.model: str = self._loaded.name
        self.model_config: ModelConfig = self._loaded.config
        self.device: str = self._loaded.device
        self.dtype: str = self._loaded.dtype
        self.max_model_len: int = self._loaded.max_model_len
        self.memory: MemoryPlan = self._loaded.memory

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete the prompts, all at once, and return their outputs in the same order.

        Args:
            prompts: Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; or a list of those.
            sampling_params: One for all prompts or one for each; None for the model's defaults.
            use_tqdm: Show a progress bar on stderr.

        Raises:
            RequestError: A prompt or its parameters can never be served; then none of the prompts was begun.
        """
        parsed = [self._loaded.encode(prompt) for prompt in parse_prompts(prompts)]
        return self._run(parsed, match_params(sampling_params, len(parsed), self._default_params), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations, in the model's chat format.

        Args:
            messages: A list of {"role": ..., "content": ...}, or a list of such lists.
            sampling_params: As for `generate`.
            use_tqdm: As for `generate`.
            chat_template: Jinja text instead of the model's template.
            add_generation_prompt: End the prompt where the assistant's answer begins.
            continue_final_message: Go on with the last message instead; needs `add_generation_prompt=False`.
            tools: Descriptions of functions the model may call.
            chat_template_kwargs: Further variables of the template, such as {"enable_thinking": False}.
        """
        conversations = parse_conversations(messages)
        prompts = [
            self._loaded.render_chat(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self._run(prompts, match_params(sampling_params, len(prompts), self._default_params), use_tqdm)

    def stream(self, prompt: PromptLike, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, yielding after every token: `text` is all there is so far, `delta` what is new.

        The request is checked now and begun by the first `next`; leaving the loop early aborts it. Several streams may
        be open at once and then share their steps.
        """
        (parsed,) = (self._loaded.encode(prompt) for prompt in _single(prompt))
        return self._checked_stream(parsed, sampling_params)

    def stream_chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer one conversation as `stream` does; the arguments are those of `chat`."""
        prompt = self._loaded.render_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._checked_stream(prompt, sampling_params)

    @staticmethod
    def plan(model: str | Path | None = None, **options: Any) -> ModelPlan:
        """What `LLM(model, **options)` would need and how much context fits, without loading the weights.

        Takes the keywords of `LLM`, and `device_memory`, (free, total) bytes of a device that is not here.
        """
        if "block_size" in options:
            options["page_size"] = options.pop("block_size")
        own = {key: options.pop(key) for key in ("revision", "hf_overrides", "device_memory") if key in options}
        return plan_model(model, EngineConfig(**options), **own)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: `encode`, `decode`, `apply_chat_template`."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when no `sampling_params` are given: the model's generation_config.json."""
        return self._default_params

    def get_metrics(self) -> dict[str, float | dict[str, int]]:
        """Gauges and totals of the engine under vLLM's names, such as num_requests_running; see `Engine.metrics`."""
        return self._loaded.engine.metrics()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if some stay because open streams use them."""
        with self._turns.take():
            return self._loaded.engine.reset_prefix_cache()

    def close(self) -> None:
        """End open streams and free the device; safe to call again."""
        with self._turns.take():
            self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], use_tqdm: bool) -> list[RequestOutput]:
        """Serve all of `prompts`, or raise with none of them left in the engine."""
        engine = self._loaded.engine
        for prompt, param in zip(prompts, params, strict=True):
            engine.check(prompt.token_ids or (), param)
        todo = deque(zip(prompts, params, strict=True))
        arrival_time = engine.now()
        ids: list[str] = []
        unfinished: set[str] = set()
        outputs: dict[str, RequestOutput] = {}
        progress = tqdm(total=len(prompts), desc="generate", unit="prompt", dynamic_ncols=True, disable=not use_tqdm)
        with self._turns.take() as pause, progress as bar:
            engine = self._loaded.engine  # raises if another thread closed it
            try:
                while todo or unfinished:
                    pause()  # between two steps every request is in its place
                    room = engine.num_wanted_tokens if todo else 0  # the others are added while the device computes
                    while todo and room > 0:
                        prompt, param = todo.popleft()
                        token_ids = prompt.token_ids or ()
                        ids.append(engine.add(token_ids, param, prompt=prompt.text, checked_at=arrival_time))
                        unfinished.add(ids[-1])
                        room -= len(token_ids)
                    for request_id in unfinished.intersection(engine.step().finished):
                        outputs[request_id] = engine.take(request_id)
                        unfinished.remove(request_id)
                        bar.update()
            finally:
                for request_id in ids:
                    engine.abort(request_id)  # nothing, for those that were taken
                if not engine.has_unfinished:
                    engine.rest()
        return [outputs[request_id] for request_id in ids]

    def _checked_stream(self, prompt: Prompt, sampling_params: SamplingParams | None) -> Iterator[RequestOutput]:
        (params,) = match_params(sampling_params, 1, self._default_params)
        self._loaded.engine.check(prompt.token_ids or (), params)
        return self._stream(prompt, params)

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[RequestOutput]:
        engine = self._loaded.engine
        request_id, finished = "", False
        try:
            while not finished:
                with self._turns.take() as pause:
                    engine = self._loaded.engine  # raises if it was closed meanwhile
                    request_id = request_id or engine.add(prompt.token_ids or (), params, prompt=prompt.text)
                    while not engine.has_news(request_id):  # another stream's step may have brought some
                        pause()
                        engine.step()
                    output = engine.take(request_id)
                finished = output.finished
                yield output
        finally:
            self._turns.later(partial(engine.abort, request_id))


def _single(prompt: PromptLike) -> list[Prompt]:
    prompts = parse_prompts(prompt)
    if len(prompts) != 1:
        raise RequestError(f"stream takes one prompt, got {len(prompts)}: use generate for several")
    return prompts
