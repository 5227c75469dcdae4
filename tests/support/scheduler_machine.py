"""Random walks over a `Scheduler` with a fake model that sees only the arrays of `ForwardBatch`.

The fake model keeps token ids where the real one keeps keys and values, and its next token is a function of all tokens
it reads back through the page table. So a wrong slot, page table, position or schedule changes what is generated, and
every request must end up with exactly what it would generate alone.
"""

import zlib
from collections import defaultdict
from itertools import pairwise

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mili.batch import ForwardBatch
from mili.cache import KVCache
from mili.outputs import FinishReason
from mili.request import Request, RequestStatus, ScheduledRequest
from mili.sampling_params import SamplingParams
from mili.scheduler import Scheduler

PAGE_SIZE = 4
EOS = 0
VOCAB_SIZE = 9

MACHINE_SETTINGS = settings(max_examples=250, stateful_step_count=40, deadline=None, derandomize=True, database=None)


def next_token(token_ids: list[int]) -> int:
    return zlib.crc32(bytes(token_ids)) % VOCAB_SIZE


class FakeRunner:
    """Runs a `ForwardBatch` on token ids instead of keys and values."""

    def __init__(self, num_pages: int) -> None:
        self.memory = np.full(num_pages * PAGE_SIZE, 255, dtype=np.int32)  # [slots]

    def execute(self, batch: ForwardBatch) -> list[int]:
        """The next token for each logit row."""
        assert len(set(batch.slots.tolist())) == len(batch.slots), "two tokens are written to one slot"
        assert batch.slots.min() >= PAGE_SIZE, "a token is written to the scratch page"
        self.memory[batch.slots] = batch.token_ids
        tokens = []
        for row in batch.logit_rows.tolist():
            owner = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            positions = np.arange(batch.positions[row] + 1)
            slots = batch.page_table[owner][positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            tokens.append(next_token(self.memory[slots].tolist()))
        return tokens


def generate_alone(request: Request) -> tuple[list[int], FinishReason, int | None]:
    """Output, finish reason and stop reason of a request that is alone on an endless machine."""
    token_ids, params = list(request.prompt_token_ids), request.params
    output: list[int] = []
    while True:
        token = next_token(token_ids)
        token_ids.append(token)
        output.append(token)
        if len(output) >= params.min_tokens:
            if token == EOS and not params.ignore_eos:
                return output, FinishReason.STOP, None
            if token in params.stop_token_ids:
                return output, FinishReason.STOP, token
        if len(token_ids) == request.max_len:
            return output, FinishReason.LENGTH, None


class SchedulerMachine(RuleBasedStateMachine):
    scheduler_class: type[Scheduler] = Scheduler

    @initialize(
        num_pages=st.integers(5, 10),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 16),
        max_logit_rows=st.integers(1, 6),
        enable_prefix_caching=st.sampled_from([True, True, False]),
    )
    def start(
        self,
        num_pages: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_logit_rows: int,
        enable_prefix_caching: bool,
    ) -> None:
        self.cache = KVCache(num_pages, PAGE_SIZE, enable_prefix_caching)
        self.scheduler = self.scheduler_class(self.cache, max_num_seqs, max_num_batched_tokens, max_logit_rows)
        self.runner = FakeRunner(num_pages)
        self.requests: list[Request] = []
        self.stopped: set[Request] = set()  # ended by the test
        self.seen: dict[Request, int] = {}  # output tokens at the last look
        self.prompt_rows: dict[Request, list[int]] = defaultdict(list)  # positions of the predicted tokens

    @rule(
        # Prompts share beginnings: a run of one token, then a tail.
        prompt=st.tuples(st.integers(1, 2), st.integers(1, 10), st.lists(st.integers(0, 2), max_size=3)),
        params=st.builds(
            SamplingParams,
            min_tokens=st.integers(0, 3),
            ignore_eos=st.sampled_from([True, True, False]),
            stop_token_ids=st.sampled_from([(), (), (3,), (EOS, 4)]),
            prompt_logprobs=st.sampled_from([None, None, None, 0]),
        ),
        max_tokens=st.integers(1, 20),
    )
    def add(self, prompt: tuple[int, int, list[int]], params: SamplingParams, max_tokens: int) -> None:
        token_ids = (prompt[0],) * prompt[1] + tuple(prompt[2])
        max_len = min(len(token_ids) + max_tokens, self.scheduler.max_request_len)
        request = Request(str(len(self.requests)), token_ids, params, max_len, eos_token_ids=frozenset([EOS]))
        self.scheduler.add(request)
        self.requests.append(request)

    @rule(count=st.integers(1, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        plan = self.schedule()
        if not plan:
            return
        batch = ForwardBatch.build(plan, PAGE_SIZE)
        tokens = self.runner.execute(batch)
        for (index, kind, position), token in zip(batch.logit_owners, tokens, strict=False):
            request = plan[index].request
            assert token == next_token(request.token_ids[:position])
            if kind == "prompt":
                self.prompt_rows[request].append(position)
        sampled = [tokens[row] for row in batch.sample_rows]
        outputs = [len(request.token_ids) for request, _ in plan]
        received = self.scheduler.record(plan, sampled)
        assert [request.token_ids[-1] for request in received] == sampled
        grown = [request for (request, _), before in zip(plan, outputs, strict=True) if len(request.token_ids) > before]
        assert grown == received

    @rule()
    def fail_a_step(self) -> None:
        self.schedule()  # and never record it

    @precondition(lambda self: self.unfinished())
    @rule(which=st.integers(0, 100), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def finish_from_outside(self, which: int, reason: FinishReason) -> None:
        request = self.unfinished()[which % len(self.unfinished())]
        if reason is FinishReason.ABORT:
            self.scheduler.abort(request)
        else:
            self.scheduler.finish(request, reason, stop_reason="text")
        assert (request.finish_reason, request.finished, request.lease) == (reason, True, None)
        self.stopped.add(request)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.cache.reset()

    @invariant()
    def queues_are_in_order(self) -> None:
        scheduler = self.scheduler
        in_line = [*scheduler.running, *scheduler.waiting]
        assert all(first.arrival < second.arrival for first, second in pairwise(in_line)), "order of arrival is lost"
        assert in_line == self.unfinished()
        assert len(scheduler.running) <= scheduler.max_num_seqs
        assert all(request.status is RequestStatus.RUNNING and request.lease for request in scheduler.running)
        assert all(request.status is RequestStatus.WAITING and not request.lease for request in scheduler.waiting)

    @invariant()
    def cache_is_sound(self) -> None:
        self.cache.check_invariants()
        if not self.scheduler.running:
            assert self.cache.usage == 0, "pages are held by nobody"

    @invariant()
    def requests_generate_what_they_would_alone(self) -> None:
        for request in self.requests:
            output, finish_reason, stop_reason = generate_alone(request)
            if request.finished and request not in self.stopped:
                assert (request.finish_reason, request.stop_reason) == (finish_reason, stop_reason)
                assert request.output_token_ids == output
            else:
                assert request.output_token_ids == output[: request.num_output_tokens]
                assert request.num_computed < len(request.token_ids), "nothing is left to compute"
                assert request.num_output_tokens >= self.seen.get(request, 0), "tokens were lost"
            self.seen[request] = request.num_output_tokens

    def schedule(self) -> list[ScheduledRequest]:
        scheduler = self.scheduler
        plan = scheduler.schedule()
        assert sum(num_new for _, num_new in plan) <= scheduler.max_num_batched_tokens, "token budget exceeded"
        assert all(num_new > 0 for _, num_new in plan)
        num_rows = sum(min(num_new, r.num_prompt_unscored) for r, num_new in plan)
        assert num_rows <= scheduler.max_logit_rows, "too many rows of logits"
        assert bool(plan) == bool(self.unfinished())
        return plan

    def unfinished(self) -> list[Request]:
        return [request for request in self.requests if not request.finished]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # The oldest running request gains a token each step, and after a preemption starts again at most once for each
        # token of the ones before it; in practice far fewer steps are needed than this.
        for _ in range(10 * sum(request.max_len for request in self.requests)):
            if not self.scheduler.has_unfinished:
                break
            self.step()
            self.queues_are_in_order()
            self.cache_is_sound()
        assert not self.scheduler.has_unfinished, "requests do not end"
        self.requests_generate_what_they_would_alone()
        assert self.cache.num_free_pages + self.cache.num_cached_pages == self.cache.num_usable_pages
        for request in self.requests:
            wanted = range(1, request.num_prompt_tokens if request.params.prompt_logprobs is not None else 1)
            if request not in self.stopped:
                assert self.prompt_rows[request] == list(wanted), "a prompt position was scored twice or never"
