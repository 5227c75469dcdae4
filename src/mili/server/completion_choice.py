"""One choice of /v1/completions, whole or bit by bit.

Invariant: the choices written for a stream add up to the one written for the finished output: texts join, lists
concatenate.
"""

from collections.abc import Sequence
from typing import TypeVar

from mili.outputs import CompletionOutput, RequestOutput
from mili.sampling_params import SamplingParams
from mili.server.logprobs import CompletionLogprobsWriter, prompt_logprobs
from mili.server.protocol_completions import CompletionRequest
from mili.server.protocol_responses import CompletionChoice, CompletionLogprobs
from mili.tokenizer import Tokenizer

T = TypeVar("T")


class CompletionChoiceWriter:
    """Writes what is new in one completion, after the prompt if that is to be echoed."""

    def __init__(
        self, index: int, body: CompletionRequest, params: SamplingParams, tokenizer: Tokenizer, prompt: str
    ) -> None:
        """`prompt` is the text to echo, empty for none."""
        self._index = index
        self._body = body
        self._prompt = prompt
        self._prompt_logprobs = self._logprobs = None
        if body.logprobs is not None:
            skip = params.skip_special_tokens
            self._prompt_logprobs = CompletionLogprobsWriter(tokenizer, body.logprobs, skip_special_tokens=False)
            self._logprobs = CompletionLogprobsWriter(tokenizer, body.logprobs, len(prompt), skip_special_tokens=skip)
        self._begun = False
        self._finished = False
        self._num_tokens = 0
        self._num_chars = 0

    def write(self, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice | None:
        """What is new, or None; tokens whose text is held back wait for it."""
        finished = completion.finish_reason is not None
        text = completion.text[self._num_chars :]
        if self._body.echo_only:
            text, has_news = "", finished
        else:
            has_news = bool(text) or finished or bool(self._prompt and not self._begun)
        if self._finished or not has_news:
            return None
        first, self._begun, self._finished = not self._begun, True, finished
        choice: CompletionChoice = {
            "index": self._index,
            "text": self._prompt + text if first else text,
            "logprobs": self._write_logprobs(output, completion, first),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = self._new(completion.token_ids)
            if first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if first and self._body.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        self._num_tokens, self._num_chars = len(completion.token_ids), len(completion.text)
        return choice

    def _write_logprobs(
        self, output: RequestOutput, completion: CompletionOutput, first: bool
    ) -> CompletionLogprobs | None:
        if self._logprobs is None or self._prompt_logprobs is None:
            return None
        assert completion.logprobs is not None
        # A stop string cuts the text, not the tokens.
        end = None if completion.finish_reason is None else len(self._prompt) + len(completion.text)
        logprobs = self._logprobs.write(self._new(completion.token_ids), self._new(completion.logprobs), end)
        if not first or not self._body.echo:
            return logprobs
        assert output.prompt_logprobs is not None
        of_prompt = self._prompt_logprobs.write(output.prompt_token_ids, output.prompt_logprobs)
        return {
            "tokens": of_prompt["tokens"] + logprobs["tokens"],
            "token_logprobs": of_prompt["token_logprobs"] + logprobs["token_logprobs"],
            "top_logprobs": of_prompt["top_logprobs"] + logprobs["top_logprobs"],
            "text_offset": of_prompt["text_offset"] + logprobs["text_offset"],
        }

    def _new(self, items: Sequence[T]) -> list[T]:
        """Of a list with one item for each token, those that were not written yet and are to be shown."""
        return [] if self._body.echo_only else list(items[self._num_tokens :])
