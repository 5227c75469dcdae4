"""The way into the engine: which requests it can ever serve, and what of a request depends on the vocabulary.

It knows limits and the tokenizer; it knows no queue, and a request that passes can still have to wait. Invariant: a
check has no effect, so a list of prompts can be checked as a whole before any of it is queued.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mili.errors import RequestError
from mili.sampling import check_vocabulary
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of one engine."""

    vocab_size: int
    max_model_len: int  # most tokens of one request, prompt and output together

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise `RequestError` if the request can never be served; the message gives the value and the limit."""
        num_prompt = len(prompt_token_ids)
        if num_prompt == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if num_prompt >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, and max_model_len is {self.max_model_len} for prompt and output "
                "together: shorten the prompt or raise max_model_len"
            )
        if not self._all_exist(prompt_token_ids):
            bad = next(i for i in prompt_token_ids if not 0 <= i < self.vocab_size)
            raise RequestError(f"prompt token id {bad} is out of range: the model has ids 0 to {self.vocab_size - 1}")
        check_vocabulary(params, self.vocab_size)
        room = self.max_model_len - num_prompt
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens is {params.min_tokens}, but the prompt of {num_prompt} tokens leaves room for {room} in "
                f"max_model_len {self.max_model_len}: lower min_tokens or shorten the prompt"
            )

    def _all_exist(self, token_ids: Sequence[int]) -> bool:
        try:
            unsigned = array("I", token_ids)  # the quickest look at all of them; it has no place for a negative one
        except OverflowError:
            return False
        return int(np.frombuffer(unsigned, np.uint32).max()) < self.vocab_size

    def max_len(self, num_prompt: int, params: SamplingParams) -> int:
        """Most tokens a request may come to, prompt included: `max_tokens` further ones, or up to the context's end."""
        if params.max_tokens is None:
            return self.max_model_len
        return min(num_prompt + params.max_tokens, self.max_model_len)


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids that spell each of `words`, at the start of a text and after a space, as vLLM finds them."""
    found: list[list[int]] = []
    for word in words:
        bare = word.lstrip() or word  # white space alone is a word too
        at_start = tokenizer.encode(bare, add_special_tokens=False)
        if not at_start:
            continue
        found.append(at_start)
        after_space = tokenizer.encode(f" {bare}", add_special_tokens=False)
        # With another first token and as many of them the space is part of the word's own token.
        if not bare.isspace() and after_space[0] != at_start[0] and len(after_space) == len(at_start):
            found.append(after_space)
    return found


def derived_seed(seed: int, index: int) -> int:
    """The `index`-th of 2**64 seeds that look unrelated, for requests without one (SplitMix64, Steele 2014)."""
    mask = 2**64 - 1
    value = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)
