"""What the sampling op is told about each row of logits: parameters, random stream, edits to single logits, masks.

Pure NumPy. It knows sampling options and the token ids of one request at a time; it knows no logits, device or text.
Invariant: a row depends on its own request only, never on its neighbours in the batch.

    rows            A: penalties          B: plain    C: logit_bias
    edit_ids        a0 a1 a2            |           | c0               [E]
    edit_starts     0                     3           3        4       [R+1]

An edit replaces a logit by ``rep(logit + bias) - subtract``, where ``rep(x) = x / r if x > 0 else x * r``: first
``logit_bias`` and bans (bias -inf), then the repetition penalty (prompt and output), then frequency and presence
penalties (output only). This order and the formulas are vLLM's. A mask then leaves only the tokens whose bits are set.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mili.errors import RequestError
from mili.sampling_params import SamplingParams

__all__ = ["SamplerState", "SamplingBatch", "SamplingRow", "check_vocabulary"]

IntArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]

_INT32_MAX = 2**31 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_BAN = (-math.inf, 1.0, 0.0)


class SamplingRow(NamedTuple):
    """One row of logits; the arrays belong to the `SamplerState` and hold until its next `append`."""

    floats: tuple[float, float, float]  # temperature (0 is greedy), top_p, min_p
    ints: tuple[int, int, int, int, int, int]  # as the columns of SamplingBatch.ints but the last
    edit_ids: IntArray | None = None  # [e] distinct token ids
    edit_values: FloatArray | None = None  # [e, 3] bias, repetition, subtract
    mask: IntArray | None = None  # [W] the tokens that may be drawn, token i as bit i % 32 of word i // 32

    @classmethod
    def scoring(cls, target_id: int, num_logprobs: int) -> "SamplingRow":
        """A row that only reports on a token known already, as ``prompt_logprobs`` needs; what it draws is unused."""
        return cls((0.0, 1.0, 0.0), (0, num_logprobs, target_id, 0, 0, 0))


_UNUSED_ROW = SamplingRow.scoring(-1, -1)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """The arrays of R rows with E edits and G masks, as `mili.ops.sampling.sample` takes them; all C-contiguous."""

    floats: FloatArray  # [R, 3] temperature, top_p, min_p
    ints: IntArray  # [R, 7] top_k, num_logprobs, target_id, seed_lo, seed_hi, position, row of masks or -1
    edit_starts: IntArray  # [R+1] row r has the edits edit_starts[r]..edit_starts[r+1]-1
    edit_ids: IntArray  # [E] distinct within a row; a lone unused entry if there are none
    edit_values: FloatArray  # [E, 3] bias, repetition, subtract
    masks: IntArray  # [G, W]; a lone unused word if there are none

    @classmethod
    def build(cls, rows: Sequence[SamplingRow]) -> "SamplingBatch":
        """Packs the rows in order; no rows give the one unused row that goes with a `ForwardBatch` without owners."""
        rows = rows or [_UNUSED_ROW]
        edited = [(index, row) for index, row in enumerate(rows) if row.edit_ids is not None]
        edit_starts = np.zeros(len(rows) + 1, dtype=np.int32)  # [R+1]
        if edited:
            edit_ids = np.concatenate([row.edit_ids for _, row in edited])
            edit_values = np.concatenate([row.edit_values for _, row in edited])
            for index, row in edited:
                edit_starts[index + 1] = len(row.edit_ids)  # type: ignore[arg-type]
            np.cumsum(edit_starts, out=edit_starts)
        else:
            edit_ids = np.zeros(1, dtype=np.int32)
            edit_values = np.zeros((1, 3), dtype=np.float32)
        masked = [(index, row.mask) for index, row in enumerate(rows) if row.mask is not None]
        ints = np.full((len(rows), 7), -1, dtype=np.int32)
        ints[:, :6] = [row.ints for row in rows]
        if masked:
            ints[[index for index, _ in masked], 6] = range(len(masked))
        return cls(
            floats=np.array([row.floats for row in rows], dtype=np.float32),
            ints=ints,
            edit_starts=edit_starts,
            edit_ids=edit_ids,
            edit_values=edit_values,
            masks=np.stack([mask for _, mask in masked]) if masked else np.zeros((1, 1), dtype=np.int32),
        )


class SamplerState:
    """The sampling side of one request: counts of its tokens, kept by `append`, and the row of the next draw.

    The random stream is keyed by (seed, index of the drawn token among prompt and output), so a preempted request, or
    one in another batch, draws the same.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        stop_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        seed: int = 0,
    ) -> None:
        """Starts before the first draw.

        Args:
            params: The request's options. ``params.seed`` and ``params.bad_words`` are not read: see the next three.
            prompt_token_ids: The prompt.
            stop_ids: Every token id that ends the request; banned before ``params.min_tokens``.
            bad_words: The token ids of each bad word; its last token is banned where the output ends with the others.
            seed: Any integer; its low 64 bits count.
        """
        self._min_tokens = params.min_tokens if stop_ids else 0
        self._stop_ids = list(stop_ids)
        self._bad_words = [tuple(word) for word in bad_words if len(word) > 0]
        self._longest_prefix = max((len(word) - 1 for word in self._bad_words), default=0)
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._repetition = params.repetition_penalty
        self._penalises = self._repetition != 1.0 or self._presence != 0.0 or self._frequency != 0.0
        self._position = len(prompt_token_ids)
        self._num_output = 0
        self._counts: dict[int, int] = {}  # of each token in the output
        self._tail: list[int] = []  # the last _longest_prefix tokens of the output

        temperature = 0.0 if params.greedy else min(params.temperature, _FLOAT32_MAX)
        self._floats = (temperature, params.top_p, params.min_p)
        low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        self._ints = (
            min(params.top_k, _INT32_MAX),
            -1 if params.logprobs is None else params.logprobs,
            -1,
            low - ((low >> 31) << 32),  # the same bits as int32
            high - ((high >> 31) << 32),
        )

        # Lasting edits, in no order: one place per token id, looked up in _places.
        biases = params.logit_bias or {}
        repeated = np.unique(np.asarray(prompt_token_ids, dtype=np.int32)).tolist() if self._repetition != 1.0 else []
        first_ids = list(dict.fromkeys([*biases, *repeated]))
        self._places = {token_id: place for place, token_id in enumerate(first_ids)}
        self._ids = np.array(first_ids, dtype=np.int32)  # [capacity >= len(_places)]
        self._values = _no_edits(len(first_ids))  # [capacity, 3]
        for token_id, bias in biases.items():
            self._values[self._places[token_id], 0] = bias
        for token_id in repeated:
            self._values[self._places[token_id], 1] = self._repetition

    @property
    def is_steady(self) -> bool:
        """Whether the rows of all later draws are the next one's but for their position, whatever is drawn."""
        return not (self._penalises or self._bad_words or self._places or self._num_output < self._min_tokens)

    def append(self, token_id: int) -> None:
        """Takes note of the next token of the output."""
        self._position += 1
        self._num_output += 1
        if self._penalises:
            self._penalise(token_id)
        if self._longest_prefix:
            self._tail.append(token_id)
            del self._tail[: -self._longest_prefix]

    def row(self, position: int | None = None) -> SamplingRow:
        """The row of the next draw; of the one at a later `position` in the request if `is_steady`."""
        ints = (*self._ints, self._position if position is None else position)
        banned = self._banned() if self._num_output < self._min_tokens or self._bad_words else None
        if not banned:
            count = len(self._places)
            if not count:
                return SamplingRow(self._floats, ints)
            return SamplingRow(self._floats, ints, self._ids[:count], self._values[:count])
        lasting = [self._places[token_id] for token_id in banned if token_id in self._places]
        new = [token_id for token_id in banned if token_id not in self._places]
        count = len(self._places)
        ids = np.concatenate([self._ids[:count], np.array(new, dtype=np.int32)])
        values = np.concatenate([self._values[:count], np.full((len(new), 3), _BAN, dtype=np.float32)])
        values[lasting, 0] = -math.inf
        return SamplingRow(self._floats, ints, ids, values)

    def _banned(self) -> set[int]:
        """Token ids that must not be drawn next."""
        banned = set(self._stop_ids) if self._num_output < self._min_tokens else set()
        for word in self._bad_words:
            prefix = len(word) - 1
            if prefix == 0 or (prefix <= len(self._tail) and tuple(self._tail[-prefix:]) == word[:-1]):
                banned.add(word[-1])
        return banned

    def _penalise(self, token_id: int) -> None:
        """Counts one more `token_id` in the output, giving it a place first if it has none."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            spare = max(16, place)
            self._ids = np.concatenate([self._ids, np.zeros(spare, np.int32)])
            self._values = np.concatenate([self._values, _no_edits(spare)])
        count = self._counts[token_id] = self._counts.get(token_id, 0) + 1
        self._ids[place] = token_id
        self._values[place, 1:] = self._repetition, self._presence + self._frequency * count


def _no_edits(count: int) -> FloatArray:
    """[count, 3] edits that change nothing."""
    values = np.zeros((count, 3), np.float32)
    values[:, 1] = 1.0
    return values


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError if a token id in `params` does not exist in a vocabulary of `vocab_size`."""
    for name, token_ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids or ())):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(f"{name}: token id {token_id} is not below the vocabulary size {vocab_size}")
