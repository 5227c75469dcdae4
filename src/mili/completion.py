"""One completion as the caller sees it: tokens become text, stop strings are found, log-probabilities are kept.

Knows nothing of pages, steps or devices. Invariant: the deltas of the snapshots taken so far join to the text of the
last one, and text that may yet become part of a stop string is in none of them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mili.detokenizer import Detokenizer, StopMatcher
from mili.outputs import CompletionOutput, FinishReason, Logprob, TokenLogprobs
from mili.sampling_params import SamplingParams
from mili.tokenizer import Tokenizer


class Completion:
    """Grows by one token at a time until it is finished; mutated by the engine only."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._token_text = tokenizer.token_text if params.detokenize else None
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens) if params.detokenize else None
        )
        self._matcher = (
            StopMatcher(params.stop, include_stop_str_in_output=params.include_stop_str_in_output)
            if params.stop
            else None
        )
        self._pieces: list[str] = []  # text that can be shown; joined when a snapshot is taken
        self._num_sent = 0  # of those, the pieces that were in an earlier snapshot
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0

    def append(self, token_id: int) -> bool:
        """Take the next token; True when it completes a stop string, which finishes the completion."""
        self.token_ids.append(token_id)
        if self._detokenizer is None:
            return False
        return self._show(self._detokenizer.feed((token_id,)))

    def append_stop_token(self, token_id: int) -> None:
        """Take the token that ends the text: counted, but shown only with `include_stop_str_in_output`."""
        self.token_ids.append(token_id)
        if self._detokenizer is not None and self._params.include_stop_str_in_output:
            self._show(self._detokenizer.feed((token_id,)))

    def add_logprobs(self, entry: TokenLogprobs) -> None:
        """Keep the log-probabilities of the newest token, whose own entry comes first."""
        assert self._logprobs is not None
        self._logprobs.append(entry)
        self._cumulative_logprob += next(iter(entry.values())).logprob

    def finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Close the completion. A stop string found by `append` wins over `reason`."""
        if self._detokenizer is not None and (self._matcher is None or self._matcher.matched is None):
            self._show(self._detokenizer.finish())
        if self._matcher is not None:
            if self._matcher.matched is not None:
                reason, stop_reason = FinishReason.STOP, self._matcher.matched
            self._pieces.append(self._matcher.finish())
        self.finish_reason, self.stop_reason = reason, stop_reason

    def snapshot(self) -> CompletionOutput:
        """The state now; `delta` is what came since the last snapshot."""
        delta = "".join(self._pieces[self._num_sent :])
        self._pieces = ["".join(self._pieces)]
        self._num_sent = 1
        return CompletionOutput(
            index=self.index,
            text=self._pieces[0],
            token_ids=self.token_ids.copy(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            delta=delta,
        )

    def _show(self, text: str) -> bool:
        if self._matcher is None:
            self._pieces.append(text)
            return False
        # Tokens up to min_tokens cannot end the text, as vLLM counts them.
        self._pieces.append(self._matcher.feed(text, match=len(self.token_ids) > self._params.min_tokens))
        return self._matcher.matched is not None


def token_logprobs(
    step: Any,
    row: int,
    token_id: int,
    num_logprobs: int,
    tokenizer: Tokenizer | None,
) -> TokenLogprobs:
    """Logit row `row` of a step's output as a dict: `token_id` first, then the `num_logprobs` most likely tokens.

    `step.logprobs` and `step.ranks` are [R], `step.top_ids` and `step.top_logprobs` [R, 20]; `tokenizer` is None where
    no text is wanted.
    """

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token))

    result = {token_id: entry(token_id, float(step.logprobs[row]), int(step.ranks[row]))}
    top_ids: NDArray[np.int32] = step.top_ids[row, :num_logprobs]
    for rank, (token, logprob) in enumerate(zip(top_ids.tolist(), step.top_logprobs[row].tolist(), strict=False), 1):
        if token >= 0 and token not in result:  # fewer tokens than asked for in a tiny vocabulary
            result[token] = entry(token, logprob, rank)
    return result
