"""A runner without MAX: the next token is a function of the token ids that the batch's pages really hold.

It keeps token ids where the real runner keeps keys and values, so a wrong slot, page table, position or plan changes
what is generated. Logits, edits, filters and draws are computed in NumPy with the meaning the sampling op gives them,
not with its random bits.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from mili.batch import ForwardBatch
from mili.memory import MemoryPlan
from mili.sampling import SamplingBatch

MAX_LOGPROBS = 20


@dataclass
class FakeStep:
    """The fields of mili.runner.StepOutput."""

    token_ids: np.ndarray  # [R] int32
    logprobs: np.ndarray  # [R] float32
    ranks: np.ndarray  # [R] int32
    top_ids: np.ndarray  # [R, 20] int32
    top_logprobs: np.ndarray  # [R, 20] float32


@dataclass
class FakePending:
    """A submitted step of a fake runner."""

    number: int
    runner: "FakeRunner"
    step: FakeStep | None  # None if it fails

    def fetch(self) -> FakeStep:
        assert self.runner.num_steps - self.number < 2, "its results have been overwritten"
        self.runner.num_fetched = self.number
        if self.step is None:
            raise self.runner.error
        return self.step


@dataclass
class FakeRunner:
    """`next_token`, if given, names the token that the logits favour by far; otherwise they are pseudo-random."""

    num_pages: int = 65
    page_size: int = 16
    max_model_len: int = 256
    vocab_size: int = 8192
    next_token: Callable[[list[int]], int] | None = None
    fail_at: set[int] = field(default_factory=set)  # numbers of the steps that raise
    error: BaseException = field(default_factory=lambda: RuntimeError("the device is on fire"))
    dtype: str = "float32"
    device: Any = field(default_factory=lambda: SimpleNamespace(is_host=True, id=0))
    memory: MemoryPlan | None = None
    closed: bool = False
    startup_seconds: dict[str, float] = field(default_factory=dict)
    looks_ahead: bool = False  # whether a step may be submitted behind one that was not fetched
    num_steps: int = 0
    num_fetched: int = 0  # the number of the step fetched last
    num_follow_ups: int = 0  # steps fed by the one before
    num_ahead: int = 0  # steps submitted before the one before was fetched, or in place of fetching it
    num_late: int = 0  # steps whose sampling batch was made after their forward pass was begun
    batches: list[ForwardBatch] = field(default_factory=list)
    samplings: list[SamplingBatch] = field(default_factory=list)
    prefills: list[list[int]] = field(default_factory=list)  # what a request held when several tokens were added to it

    def __post_init__(self) -> None:
        self.held = np.full(self.num_pages * self.page_size, -1, dtype=np.int32)  # [slots]

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> FakeStep:
        """One step, waited for."""
        return self.submit(batch, sampling).fetch()

    def submit(
        self,
        batch: ForwardBatch,
        sampling: SamplingBatch | Callable[[], SamplingBatch],
        after: FakePending | None = None,
    ) -> FakePending:
        """One step, computed at once as a device does in order of submission, and told when it is fetched.

        Checks on the way that no slot is written twice, and the scratch page by padding only.
        """
        assert not self.closed
        self.num_steps += 1
        self.batches.append(batch)
        is_padding = np.zeros(len(batch.slots), bool)
        is_ahead = self.num_steps - self.num_fetched > 1
        assert self.looks_ahead or not is_ahead
        self.num_ahead += is_ahead
        assert (after is not None) == bool(batch.feeds)
        if after is not None:
            assert after.number == self.num_steps - 1
            self.num_follow_ups += 1
            token_ids = batch.token_ids.copy()
            for row, logit_row, count in batch.feeds:
                assert not token_ids[row : row + count].any()
                if after.step is not None:
                    token_ids[row : row + count] = after.step.token_ids[logit_row : logit_row + count]
            batch = replace(batch, token_ids=token_ids)
            is_padding = batch.slots == 0
            owners = np.repeat(np.arange(len(batch.seq_lens)), np.diff(batch.query_starts))[is_padding]
            assert (batch.page_table[owners] == 0).all()
            assert (batch.seq_lens[owners] == 1).all()
        slots = batch.slots[~is_padding]
        assert len(set(slots.tolist())) == len(slots), "two tokens are written to one slot"
        assert slots.min() >= self.page_size, "a token is written to the scratch page"
        self.held[batch.slots] = batch.token_ids
        if not isinstance(sampling, SamplingBatch):
            self.num_late += 1
            try:
                sampling = sampling()
            except BaseException:
                self.num_fetched = self.num_steps  # nobody will fetch this one
                raise
        self.samplings.append(sampling)
        failed = self.num_steps in self.fail_at
        return FakePending(self.num_steps, self, None if failed else self._compute(batch, sampling))

    def _compute(self, batch: ForwardBatch, sampling: SamplingBatch) -> FakeStep:
        num_rows = len(batch.logit_rows)
        step = FakeStep(
            np.zeros(num_rows, np.int32),
            np.zeros(num_rows, np.float32),
            np.zeros(num_rows, np.int32),
            np.full((num_rows, MAX_LOGPROBS), -1, np.int32),
            np.full((num_rows, MAX_LOGPROBS), -np.inf, np.float32),
        )
        for owner, num_new in enumerate(np.diff(batch.query_starts).tolist()):
            if num_new > 1:
                self.prefills.append(self._held(batch, owner, int(batch.seq_lens[owner])))
        for index, row in enumerate(batch.logit_rows.tolist()):
            owner = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            logits = self.logits(self._held(batch, owner, int(batch.positions[row]) + 1))
            self._sample(logits, sampling, index, step)
        return step

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """[V] float32, a function of the ids."""
        draw = np.random.default_rng(zlib.crc32(np.array(token_ids, np.int32).tobytes()))
        logits = draw.normal(scale=3.0, size=self.vocab_size).astype(np.float32)
        if self.next_token is not None:
            logits[self.next_token(list(token_ids))] += 1000.0
        return logits

    def rest(self) -> None:
        assert not self.closed

    def close(self) -> None:
        self.closed = True

    def _held(self, batch: ForwardBatch, owner: int, num_tokens: int) -> list[int]:
        positions = np.arange(num_tokens)
        slots = batch.page_table[owner][positions // self.page_size] * self.page_size + positions % self.page_size
        return self.held[slots].tolist()

    def _sample(self, logits: np.ndarray, sampling: SamplingBatch, row: int, step: FakeStep) -> None:
        temperature, top_p, min_p = sampling.floats[row].tolist()
        top_k, num_logprobs, target, seed_lo, seed_hi, position, mask = sampling.ints[row].tolist()
        edited = logits.astype(np.float64)
        edits = slice(*sampling.edit_starts[row : row + 2].tolist())
        for token, (bias, repetition, subtract) in zip(
            sampling.edit_ids[edits].tolist(), sampling.edit_values[edits].tolist(), strict=True
        ):
            value = edited[token] + bias
            edited[token] = (value / repetition if value > 0 else value * repetition) - subtract
        if mask >= 0:
            bits = np.unpackbits(sampling.masks[mask].view(np.uint8), bitorder="little")  # [32 W]
            edited[bits[: len(edited)] == 0] = -np.inf
        if temperature == 0 or np.isneginf(edited.max()):
            token = int(edited.argmax())
        else:
            token = _draw(edited, temperature, top_k, top_p, min_p, (seed_lo, seed_hi, position))
        step.token_ids[row] = token
        if num_logprobs >= 0:
            reported = token if target < 0 else target
            logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            order = np.argsort(-logits, kind="stable")[:num_logprobs]
            step.logprobs[row] = logprobs[reported]
            step.ranks[row] = 1 + int((logits > logits[reported]).sum())
            step.top_ids[row, : len(order)] = order
            step.top_logprobs[row, : len(order)] = logprobs[order]


def _draw(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, key: Any) -> int:
    scaled = (logits - logits.max()) / temperature
    if top_k:
        scaled[scaled < np.sort(scaled)[-min(top_k, len(scaled))]] = -np.inf
    weights = np.exp(scaled)
    order = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= top_p * weights.sum()]] = 0.0
    weights[weights < min_p * weights.max()] = 0.0
    u = np.random.default_rng([value & 0xFFFFFFFF for value in key]).random()
    return int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))
