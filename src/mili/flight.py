"""A step on its way through the device, and how the next one is enqueued before its tokens are known.

When nothing about the next step depends on which tokens a step samples, the next one is known but for its token ids.
Those are what the device just sampled, so they need not visit the host:

    host      launch n ── follow up ── wait n ── take in n ── follow up ── wait n+1 ── take in n+1 ...
    device    ══════ n ═══════════════════╪═ n+1 ══════════════════════════════╪═ n+2 ═══...

Any step can be planned so, with the next chunks of prompts in it, by `Scheduler.schedule` with what is in flight, and
then be launched behind it. Between two decode steps of the same requests `follow_up` does it with far less work: rows
keep their places, and the tokens of one step are those of the next row by row.

A request that ends at step n for a reason the host learns too late, such as a stop token, has a row in step n+1 whose
token is thrown away. From step n+2 on, and from n+1 on if its length ends it, the row is gone, or in a follow-up
padding: one token in the scratch page.

It knows arrays, requests and the scheduler's counts; it knows no text and no device. Invariant: for every request that
lives on, a step computes the same tokens from the same pages as if it had been planned after its predecessor. With
follow-ups also its neighbours are the same; else a place or pages that such an end leaves are taken a step later. What
a row writes after its request's end lies past the tokens that were counted, so in a page of which no prefix is shared;
the page's next owner writes it in a step enqueued later.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mili.batch import Feed, ForwardBatch, IntArray
from mili.cache import PageLease
from mili.request import InFlight, Request, ScheduledRequest
from mili.sampling import SamplingBatch
from mili.scheduler import Scheduler

if TYPE_CHECKING:  # for their types only: importing the runner imports MAX
    from mili.runner import PendingStep, Runner


@dataclass(eq=False, slots=True)
class Flight:
    """One submitted step."""

    plan: list[ScheduledRequest]  # of the requests that had not ended when last looked
    rows: list[int]  # of logits: the one that each request of `plan` is sampled from; -1 in mid-prompt
    batch: ForwardBatch
    sampling: SamplingBatch | None  # None if it was made late, which no steady step's is
    pending: "PendingStep"
    is_steady: bool  # the next rows of those sampled here differ from these in positions only
    has_old_tables: bool = False  # pages were swapped, perhaps, between this batch's making and now
    scored: list[tuple[int, Request, int]] = field(default_factory=list)  # row of logits, whose, token's position

    def drop_finished(self) -> bool:
        """Forget the requests that have ended; False if none is left."""
        if any(request.finished for request, _ in self.plan):
            alive = [index for index, (request, _) in enumerate(self.plan) if not request.finished]
            self.plan = [self.plan[index] for index in alive]
            self.rows = [self.rows[index] for index in alive]
        return bool(self.plan)

    def parts(self) -> dict[Request, InFlight]:
        """What each request has in flight."""
        return {request: InFlight(num_new, row) for (request, num_new), row in zip(self.plan, self.rows, strict=True)}

    def follow_up(self, runner: "Runner", scheduler: Scheduler) -> "Flight | None":
        """Enqueue the step after this one if both are decode steps of the same requests, and return it, or else None.

        Takes the pages that the next tokens need; a request that gets them too early simply has them already.
        """
        num_rows = len(self.batch.seq_lens)
        if not self.is_steady or self.sampling is None or len(self.batch.logit_rows) != num_rows:
            return None
        if len(self.plan) != len(scheduler.running) or min(self.rows) < 0:
            return None
        cache = scheduler.cache
        page_size = cache.page_size
        plan: list[ScheduledRequest] = []
        rows: list[int] = []
        moved: list[tuple[int, PageLease]] = []  # rows of the page table that differ from this step's
        shares_pages = False
        for row, (request, num_new) in zip(self.rows, self.plan, strict=True):
            num_tokens = request.num_computed + num_new + 1  # with the one that this step samples
            if num_tokens >= request.max_len:
                continue
            lease = request.lease
            assert lease is not None
            if num_tokens > lease.num_pages * page_size and not cache.grow(lease, num_tokens):
                return None
            if self.has_old_tables or num_tokens % page_size == 1 or page_size == 1:
                moved.append((row, lease))
            if request.num_computed < len(request.prompt_token_ids):
                # Recording this step shares the prompt's pages. If that replaced them by older ones, which a prefill of
                # another shape may have computed with other roundings, a step planned later would read those.
                if cache.would_swap(lease, request.token_ids[: num_tokens - 1]):
                    return None
                shares_pages = True
            rows.append(row)
            plan.append(ScheduledRequest(request, 1))
        if scheduler.waiting and len(plan) < scheduler.max_num_seqs:
            return None  # somebody may be admitted
        if not plan or (len(plan) - 1).bit_length() < (num_rows - 1).bit_length():
            return None  # nobody is left, or batches of half the size will do: they are padded to powers of two
        batch = self._next_batch(rows, moved, page_size)
        ints = self.sampling.ints.copy()
        ints[:, 5] += 1  # the random streams are keyed by the position drawn
        sampling = replace(self.sampling, ints=ints)
        pending = runner.submit(batch, sampling, after=self.pending)
        return Flight(plan, rows, batch, sampling, pending, is_steady=True, has_old_tables=shares_pages)

    def _next_batch(self, rows: list[int], moved: list[tuple[int, PageLease]], page_size: int) -> ForwardBatch:
        """One token a row: the one after this step's last if the row is among `rows`, else padding."""
        num_rows = len(self.batch.seq_lens)
        positions = self.batch.seq_lens.copy()  # [B]
        if len(rows) < num_rows:
            is_padding = np.ones(num_rows, bool)
            is_padding[rows] = False
            positions[is_padding] = 0
        pages = positions // page_size  # [B] the page of each row's token
        old = self.batch.page_table
        page_table: IntArray = np.zeros((num_rows, max(int(pages.max()) + 1, old.shape[1])), np.int32)  # [B, P]
        page_table[:, : old.shape[1]] = old
        for row, lease in moved:
            count = min(lease.num_pages, page_table.shape[1])
            page_table[row, :count] = lease.page_table[:count]
        if len(rows) < num_rows:
            page_table[is_padding] = 0
        every_row = np.arange(num_rows + 1, dtype=np.int32)
        return ForwardBatch(
            token_ids=np.zeros(num_rows, np.int32),  # the device puts in what this step samples
            positions=positions,
            slots=page_table[every_row[:-1], pages] * np.int32(page_size) + positions % page_size,
            query_starts=every_row,
            seq_lens=positions + np.int32(1),
            page_table=page_table,
            logit_rows=every_row[:-1],
            logit_owners=[],
            sample_rows=np.array(rows, np.int32),
            feeds=[Feed(0, 0, num_rows)],
        )
