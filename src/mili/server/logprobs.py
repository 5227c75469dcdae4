"""Log-probabilities in the shapes of OpenAI's two endpoints and of vLLM's `prompt_logprobs`.

Knows the engine's entries (`TokenLogprobs`: the token itself first, then the most likely ones) and a tokenizer.
Invariant: every number is finite, because JSON has no infinity.
"""

from collections.abc import Iterable, Sequence

from mili.detokenizer import Detokenizer
from mili.outputs import Logprob, TokenLogprobs
from mili.server.protocol_responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from mili.tokenizer import Tokenizer

_LOWEST = -9999.0  # what vLLM writes for minus infinity


def chat_logprobs(entries: Iterable[TokenLogprobs], num_top: int, tokenizer: Tokenizer) -> ChatLogprobs:
    """The entries of generated tokens in the shape of /v1/chat/completions."""
    content: list[TokenLogprob] = []
    for entry in entries:
        token_id, logprob = next(iter(entry.items()))
        top = [_token(i, value, tokenizer) for i, value in _most_likely(entry, num_top)]
        content.append({**_token(token_id, logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


class CompletionLogprobsWriter:
    """The shape of /v1/completions, whose offsets count the characters of what came before."""

    def __init__(self, tokenizer: Tokenizer, num_top: int, offset: int = 0, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._offset = offset

    def write(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], end: int | None = None
    ) -> CompletionLogprobs:
        """The next tokens; a prompt's first token has no entry.

        `end` is where the text was cut, if it was: the offset of all tokens that lie past it.
        """
        result: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            result["tokens"].append(self._tokenizer.token_text(token_id))
            result["text_offset"].append(self._offset if end is None else min(self._offset, end))
            self._offset += len(self._detokenizer.feed((token_id,)))
            if entry is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
                continue
            result["token_logprobs"].append(_finite(entry[token_id]))
            top: dict[str, float] = {}
            for other, logprob in _most_likely(entry, self._num_top):
                top.setdefault(self._tokenizer.token_text(other), _finite(logprob))  # parts of characters look alike
            result["top_logprobs"].append(top)
        return result


def prompt_logprobs(entries: Iterable[TokenLogprobs | None]) -> PromptLogprobs:
    """The entries of a prompt's tokens as vLLM writes them."""

    def write(logprob: Logprob) -> PromptLogprob:
        return {"logprob": _finite(logprob), "rank": logprob.rank, "decoded_token": logprob.decoded_token}

    return [None if entry is None else {str(i): write(logprob) for i, logprob in entry.items()} for entry in entries]


def _most_likely(entry: TokenLogprobs, num_top: int) -> list[tuple[int, Logprob]]:
    """The `num_top` most likely tokens, in order; the entry's own token is one only if its rank says so."""
    ranked = [(i, logprob) for i, logprob in entry.items() if logprob.rank is not None and logprob.rank <= num_top]
    return sorted(ranked, key=lambda item: item[1].logprob, reverse=True)[:num_top]


def _token(token_id: int, logprob: Logprob, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST)
