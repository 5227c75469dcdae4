"""The arrays of one step: scheduled requests packed end to end into a ragged batch.

Pure NumPy. It knows requests and their page tables; it knows no device and no model.
Invariant: row t of the batch is one token, with its position in its request and the slot its keys and values go to;
rows of a request are consecutive and in order, and its slots lie in pages of its own lease.

    plan            A: 1 token (decode)   B: 4 tokens (prefill)   C: 1 token
    token_ids       a17 | b0 b1 b2 b3 | c5                        [T]    T = 6
    query_starts    0     1             5    6                    [B+1]  prefix sums of the row counts
    logit_rows      0               4   5                         [R]    the last row of each, if all is computed then

Layout as FlashInfer's ragged tensor and page table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from mili.request import InFlight, Request, ScheduledRequest

IntArray: TypeAlias = npt.NDArray[np.int32]

# Whose logits a row holds: the request's index in the plan, what they are for, and the position in the request's
# token_ids of the token they predict: len(token_ids) for "sample"; for "prompt" that token is known already.
LogitOwner: TypeAlias = tuple[int, Literal["sample", "prompt"], int]

_NOTHING: Mapping[Request, InFlight] = MappingProxyType({})


class Feed(NamedTuple):
    """Rows of a batch whose token ids the step before is about to sample."""

    row: int  # the first of them
    logit_row: int  # of the step before: the one the first is sampled from, the others follow
    num_rows: int


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBatch:
    """T tokens of B requests, P pages for the longest, R rows of logits; all arrays int32 and C-contiguous."""

    # --8<-- [start:fields]
    token_ids: IntArray  # [T]
    positions: IntArray  # [T] index of the token in its request
    slots: IntArray  # [T] page * page_size + offset: where the token's keys and values are written
    query_starts: IntArray  # [B+1] rows query_starts[b]..query_starts[b+1]-1 belong to request b
    seq_lens: IntArray  # [B] tokens in the cache after this step
    page_table: IntArray  # [B, P] page ids, padded with the scratch page 0
    # --8<-- [end:fields]
    logit_rows: IntArray  # [R] the rows whose logits are wanted; a lone 0 without an owner if there are none
    logit_owners: list[LogitOwner]  # one per row of logits, in order; empty for that lone 0
    sample_rows: IntArray  # [requests sampled from] which of the R rows, in plan order: what Scheduler.record takes
    feeds: Sequence[Feed] = ()  # what the device fills in; these token ids are 0 here

    @classmethod
    def build(
        cls, plan: Sequence[ScheduledRequest], page_size: int, in_flight: Mapping[Request, InFlight] = _NOTHING
    ) -> "ForwardBatch":
        """Packs a plan of `Scheduler.schedule`, between `schedule` and `record`; `plan` must not be empty.

        Each request has its last row's logits computed if the step completes its tokens. With `prompt_logprobs` also
        the row of each prompt position but the last, once in the request's life. `in_flight` is what the plan was made
        with.
        """
        num_requests = len(plan)
        tokens: list[int] = []
        first_positions: list[int] = []
        tables: list[IntArray] = []
        logit_rows: list[int] = []
        owners: list[LogitOwner] = []
        sample_rows: list[int] = []
        feeds: list[Feed] = []
        for index, (request, num_new) in enumerate(plan):
            first, token_ids, lease = request.num_computed, request.token_ids, request.lease
            assert lease is not None and num_new > 0
            part = in_flight.get(request) if in_flight else None
            if part is not None:
                first += part.num_new_tokens
            seq_len = first + num_new
            if request.params.prompt_logprobs is not None:
                scored = range(max(first, request.num_prompt_scored), min(seq_len, request.num_prompt_tokens - 1))
                logit_rows += [len(tokens) + position - first for position in scored]
                owners += [(index, "prompt", position + 1) for position in scored]
            if first == len(token_ids):
                assert part is not None and part.logit_row >= 0
                _feed(feeds, len(tokens), part.logit_row)
                tokens.append(0)
            elif num_new == 1:
                tokens.append(token_ids[first])
            else:
                tokens += token_ids[first:seq_len]
            first_positions.append(first)
            tables.append(lease.page_table)
            if seq_len >= len(token_ids):
                sample_rows.append(len(logit_rows))
                logit_rows.append(len(tokens) - 1)
                owners.append((index, "sample", seq_len))

        row_counts = np.array([num_new for _, num_new in plan], dtype=np.int32)  # [B]
        query_starts = np.zeros(num_requests + 1, dtype=np.int32)  # [B+1]
        np.cumsum(row_counts, out=query_starts[1:])
        starts = np.array(first_positions, dtype=np.int32)  # [B]
        seq_lens = starts + row_counts  # [B]
        num_pages = -(-seq_lens // page_size)  # [B]
        page_table = np.zeros((num_requests, int(num_pages.max())), dtype=np.int32)  # [B, P]
        for row, table, count in zip(page_table, tables, num_pages.tolist(), strict=True):
            row[:count] = table[:count]
        owner = np.repeat(np.arange(num_requests, dtype=np.int32), row_counts)  # [T] request of each row
        positions = np.arange(len(tokens), dtype=np.int32) + (starts - query_starts[:-1])[owner]  # [T]
        slots = page_table[owner, positions // page_size] * page_size + positions % page_size  # [T]
        return cls(
            token_ids=np.array(tokens, dtype=np.int32),
            positions=positions,
            slots=slots.astype(np.int32, copy=False),
            query_starts=query_starts,
            seq_lens=seq_lens,
            page_table=page_table,
            logit_rows=np.array(logit_rows or [0], dtype=np.int32),
            logit_owners=owners,
            sample_rows=np.array(sample_rows, dtype=np.int32),
            feeds=feeds,
        )

    @property
    def max_query_len(self) -> IntArray:
        """[] most rows any request has."""
        return np.array(np.diff(self.query_starts).max(), np.int32)

    @property
    def max_seq_len(self) -> IntArray:
        """[] most tokens any request has in the cache after this step."""
        return np.array(self.seq_lens.max(), np.int32)


def _feed(feeds: list[Feed], row: int, logit_row: int) -> None:
    """Adds one row, to the last of `feeds` if it goes on there."""
    if feeds and (row - feeds[-1].row, logit_row - feeds[-1].logit_row) == (feeds[-1].num_rows,) * 2:
        feeds[-1] = feeds[-1]._replace(num_rows=feeds[-1].num_rows + 1)
    else:
        feeds.append(Feed(row, logit_row, 1))
