"""What a load consists of: requests of random content, and when each is to be sent.

Knows the API's request bodies; sends nothing. Invariant: the same seed makes the same bodies at the same times, and no
two prompts are equal beyond the shared prefix.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Endpoint = Literal["completions", "chat"]
PromptKind = Literal["token-ids", "text"]

# Words that byte-pair vocabularies have as one token with their leading space, so that a word is about a token.
_WORDS = (
    *("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be"),
    *("by", "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had"),
    *("an", "they", "which", "one", "you", "were", "her", "all", "she", "there", "would", "their", "we"),
    *("him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said", "what"),
    *("up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some", "could"),
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """A number of tokens: `low` to `high`, both possible, all equally likely."""

    low: int
    high: int

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray[Any, Any]:
        """`count` lengths, int64 [count]."""
        return random.integers(self.low, self.high, size=count, endpoint=True)


@dataclass(frozen=True, slots=True)
class Workload:
    """The kind of requests of one load."""

    model: str
    endpoint: Endpoint
    prompt_kind: PromptKind
    prompt_len: Lengths
    output_len: Lengths
    prefix_len: int  # tokens before those of `prompt_len`, the same in every request
    vocab_size: int  # token ids are drawn below it
    temperature: float
    ignore_eos: bool

    def bodies(self, num_requests: int, seed: int) -> list[bytes]:
        """The requests, as JSON."""
        content, lengths = np.random.default_rng(seed).spawn(2)
        prefix = self._draw(content, self.prefix_len)
        prompt_lens = self.prompt_len.draw(lengths, num_requests)
        output_lens = self.output_len.draw(lengths, num_requests)
        return [
            self._body(prefix + self._draw(content, int(prompt_len)), int(output_len))
            for prompt_len, output_len in zip(prompt_lens, output_lens, strict=True)
        ]

    def _draw(self, random: np.random.Generator, count: int) -> list[Any]:
        """Token ids or words."""
        limit = self.vocab_size if self.prompt_kind == "token-ids" else len(_WORDS)
        drawn: list[int] = random.integers(0, limit, size=count).tolist()
        return drawn if self.prompt_kind == "token-ids" else [_WORDS[index] for index in drawn]

    def _body(self, prompt: Sequence[Any], output_len: int) -> bytes:
        content = prompt if self.prompt_kind == "token-ids" else " ".join(prompt)
        messages = [{"role": "user", "content": content}]
        body: dict[str, Any] = {"prompt": content} if self.endpoint == "completions" else {"messages": messages}
        body |= {"model": self.model, "max_tokens": output_len, "temperature": self.temperature}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:  # an extension of mili's and vLLM's; other servers refuse it
            body["ignore_eos"] = True
        return json.dumps(body).encode()


def poisson_times(num_requests: int, rate: float, seed: int) -> list[float]:
    """When to send, in seconds after the start: `rate` a second, each independent of the others."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=num_requests)  # [num_requests]
    times: list[float] = np.cumsum(gaps).tolist()
    return times
