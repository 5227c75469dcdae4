"""`Scheduler` by example: who runs, with how many tokens, and how a request ends. Tokens come from the test."""

from typing import Any

import pytest

from mili.cache import KVCache
from mili.outputs import FinishReason
from mili.request import Request, RequestStatus, ScheduledRequest
from mili.sampling_params import SamplingParams
from mili.scheduler import Scheduler

PAGE_SIZE = 4
EOS = 99


def make_scheduler(num_pages: int = 33, enable_prefix_caching: bool = True, **limits: int) -> Scheduler:
    cache = KVCache(num_pages, PAGE_SIZE, enable_prefix_caching)
    return Scheduler(cache, **{"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits})


def make_request(prompt: range | list[int], max_len: int = 100, **params: Any) -> Request:
    return Request("r", tuple(prompt), SamplingParams(**params), max_len, eos_token_ids=frozenset([EOS, EOS + 1]))


def add(scheduler: Scheduler, prompt: range | list[int], max_len: int = 100, **params: Any) -> Request:
    request = make_request(prompt, max_len, **params)
    scheduler.add(request)
    return request


def counts(plan: list[ScheduledRequest]) -> list[int]:
    return [num_new for _, num_new in plan]


def step(scheduler: Scheduler, token: int = 7) -> list[int]:
    """Runs a step in which every sample is `token`; returns the token counts of its plan."""
    plan = scheduler.schedule()
    num_sampled = sum(r.num_computed + num_new == len(r.token_ids) for r, num_new in plan)
    scheduler.record(plan, [token] * num_sampled)
    scheduler.cache.check_invariants()
    return counts(plan)


def test_a_request_is_prefilled_then_decoded() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, range(10))
    assert request.status is RequestStatus.WAITING
    plan = scheduler.schedule()
    assert plan == [ScheduledRequest(request, 10)]
    assert (request.status, request.num_computed) == (RequestStatus.RUNNING, 0)
    assert scheduler.record(plan, [7]) == [request]
    assert (request.token_ids, request.num_computed) == ([*range(10), 7], 10)
    assert step(scheduler) == [1]
    assert request.output_token_ids == [7, 7]


def test_without_requests_there_is_no_plan() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() == []
    assert scheduler.record([], []) == []
    assert not scheduler.has_unfinished


def test_long_prompts_are_chunked_by_the_token_budget() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    long, short = add(scheduler, range(20)), add(scheduler, range(50, 53))
    assert step(scheduler) == [8]
    assert (long.num_computed, long.num_output_tokens) == (8, 0)  # a sample from mid-prompt would mean nothing
    assert step(scheduler) == [8]
    assert step(scheduler) == [4, 3]
    assert (long.num_output_tokens, short.num_output_tokens) == (1, 1)
    assert step(scheduler) == [1, 1]


def test_running_requests_come_before_waiting_ones() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, range(3))
    step(scheduler)
    add(scheduler, range(50, 70))
    assert step(scheduler) == [1, 7]


def test_a_budget_below_the_number_of_running_requests_serves_the_oldest() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=2)
    requests = [add(scheduler, [i], max_len=4) for i in range(3)]
    assert step(scheduler) == [1, 1]
    assert step(scheduler) == [1, 1]
    assert [r.num_output_tokens for r in requests] == [2, 2, 0]
    for _ in range(10):
        step(scheduler)
    assert all(r.finished for r in requests)


def test_no_more_run_than_max_num_seqs() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    requests = [add(scheduler, [i], max_len=3) for i in range(3)]
    assert step(scheduler) == [1, 1]
    assert (scheduler.running, list(scheduler.waiting)) == (requests[:2], requests[2:])
    step(scheduler)
    assert scheduler.running == []
    assert scheduler.schedule() == [ScheduledRequest(requests[2], 1)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = make_scheduler()
    add(scheduler, range(10))
    step(scheduler)
    second = add(scheduler, [*range(10), 50])
    assert step(scheduler) == [1, 3]
    assert second.num_cached == 8
    assert (scheduler.num_queried_tokens, scheduler.num_cached_tokens) == (21, 8)


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = make_scheduler(enable_prefix_caching=False)
    first, second = add(scheduler, range(10), max_len=12), add(scheduler, range(10), max_len=12)
    assert step(scheduler) == [10, 10]
    step(scheduler)
    assert first.finished and second.finished
    assert scheduler.cache.num_free_pages == scheduler.cache.num_usable_pages


def test_requests_with_one_prompt_prefill_it_once() -> None:
    scheduler = make_scheduler()
    requests = [add(scheduler, range(10)) for _ in range(4)]
    other = add(scheduler, range(50, 55))
    assert step(scheduler) == [10]  # the others would compute the same pages now, and can share them in the next step
    assert step(scheduler) == [1, 2, 2, 2, 5]
    assert [r.num_cached for r in [*requests, other]] == [0, 8, 8, 8, 0]


def test_a_follower_waits_until_the_leaders_chunks_are_done() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=12)
    add(scheduler, range(20))
    add(scheduler, range(18))
    assert [step(scheduler) for _ in range(3)] == [[12], [8], [1, 2]]


def test_pages_that_cannot_be_shared_are_not_waited_for() -> None:
    scheduler = make_scheduler()
    for _ in range(3):
        add(scheduler, range(4))  # one page, of which a match would leave nothing to compute
    assert step(scheduler) == [4, 4, 4]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_pages=8)  # seven pages
    old, young, waiting = (add(scheduler, range(10 * i, 10 * i + 8), max_len=24) for i in range(1, 4))
    assert step(scheduler) == [8, 8]  # two pages each; the third request would not leave both a page to grow by
    for _ in range(4):
        step(scheduler)  # both grow to three pages
    assert scheduler.running == [old, young]
    while not young.num_preemptions:
        step(scheduler)
    assert (young.status, young.num_computed, young.lease) == (RequestStatus.WAITING, 0, None)
    assert list(scheduler.waiting) == [young, waiting]
    output = young.output_token_ids
    assert len(output) == 5 and scheduler.num_preemptions == 1
    while young.status is RequestStatus.WAITING:
        step(scheduler)
    assert young.output_token_ids[: len(output)] == output
    assert young.num_cached == 0  # what it finds of itself is no prefix shared with others
    for _ in range(60):
        step(scheduler)
    assert [r.finish_reason for r in (old, young, waiting)] == [FinishReason.LENGTH] * 3
    assert [len(r.token_ids) for r in (old, young, waiting)] == [24] * 3
    assert scheduler.cache.usage == 0


def test_a_preempted_request_finds_its_pages_again() -> None:
    scheduler = make_scheduler(num_pages=8)
    old, young = add(scheduler, range(8), max_len=28), add(scheduler, range(50, 58), max_len=28)
    while not young.num_preemptions:
        step(scheduler)
    num_tokens = len(young.token_ids)
    scheduler.abort(old)
    assert step(scheduler) == [num_tokens - (num_tokens - 1) // PAGE_SIZE * PAGE_SIZE]


def test_one_request_can_fill_the_whole_cache() -> None:
    scheduler = make_scheduler(num_pages=4, max_num_batched_tokens=5)
    assert scheduler.max_request_len == 13
    add(scheduler, range(50, 55), max_len=6)
    step(scheduler)  # leaves pages in the tree, which must make way
    request = add(scheduler, range(9), max_len=13)
    for _ in range(6):
        step(scheduler)
    assert (request.finish_reason, len(request.token_ids)) == (FinishReason.LENGTH, 13)


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_pages=4)
    with pytest.raises(AssertionError, match="14 tokens can never fit"):
        add(scheduler, range(5), max_len=14)


def test_a_step_that_failed_can_be_planned_again() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, range(5))
    add(scheduler, range(50, 60))
    first = scheduler.schedule()
    assert counts(first) == [5, 3]
    assert scheduler.schedule() == first
    scheduler.cache.check_invariants()


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop_reason"),
    [
        ({}, EOS, FinishReason.STOP, None),
        ({}, EOS + 1, FinishReason.STOP, None),
        ({}, 5, None, None),
        ({"ignore_eos": True}, EOS, None, None),
        ({"stop_token_ids": [5]}, 5, FinishReason.STOP, 5),
        ({"stop_token_ids": [EOS]}, EOS, FinishReason.STOP, None),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, FinishReason.STOP, EOS),
        ({"min_tokens": 2}, EOS, None, None),
        ({"min_tokens": 1}, EOS, FinishReason.STOP, None),
    ],
)
def test_stop_tokens(params: dict[str, Any], token: int, reason: FinishReason | None, stop_reason: int | None) -> None:
    scheduler = make_scheduler()
    request = add(scheduler, range(5), **params)
    step(scheduler, token)
    assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)
    assert request.output_token_ids == [token]
    assert request.finished == (reason is not None) == (not scheduler.has_unfinished)


def test_the_end_of_the_room_is_length_and_eos_there_is_stop() -> None:
    scheduler = make_scheduler()
    length, stop = add(scheduler, range(5), max_len=6), add(scheduler, range(50, 55), max_len=6)
    scheduler.record(scheduler.schedule(), [7, EOS])
    assert (length.finish_reason, stop.finish_reason) == (FinishReason.LENGTH, FinishReason.STOP)


def test_record_wants_one_token_for_each_sample() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=8)
    add(scheduler, range(5))
    add(scheduler, range(50, 60))  # in mid-prompt after this step
    plan = scheduler.schedule()
    with pytest.raises(AssertionError, match="more tokens sampled"):
        scheduler.record(plan, [7, 7])


def test_finish_in_either_queue_gives_up_the_pages() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, range(6)), add(scheduler, range(6))
    step(scheduler)
    scheduler.finish(running, FinishReason.STOP, stop_reason="\n")
    scheduler.abort(waiting)
    scheduler.abort(waiting)  # no more to do
    assert (running.finish_reason, running.stop_reason) == (FinishReason.STOP, "\n")
    assert (waiting.finish_reason, waiting.stop_reason) == (FinishReason.ABORT, None)
    assert not scheduler.has_unfinished
    assert scheduler.cache.usage == 0


def test_prompt_logprobs_compute_every_position_in_small_chunks() -> None:
    scheduler = make_scheduler(max_logit_rows=3)
    add(scheduler, range(8))
    step(scheduler)
    scored, other, plain = (
        add(scheduler, range(8), prompt_logprobs=0),
        add(scheduler, range(8), prompt_logprobs=0),
        add(scheduler, range(50, 54)),
    )
    assert step(scheduler) == [1, 3]  # no prefix for it, and no rows for those behind it
    assert step(scheduler) == [1, 3]
    assert scored.num_prompt_unscored == 1
    assert step(scheduler) == [1, 2, 1, 4]  # two rows for the first, one for the next, and the third needs none
    assert (scored.num_cached, scored.num_prompt_unscored, scored.num_output_tokens) == (0, 0, 1)
    while other.num_prompt_unscored:
        step(scheduler)
    assert (other.num_cached, plain.num_cached) == (0, 0)


def test_a_request_is_added_once() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, range(5))
    with pytest.raises(AssertionError, match="added once"):
        scheduler.add(request)


@pytest.mark.parametrize(("prompt", "max_len"), [(range(0), 5), (range(5), 5)])
def test_a_request_has_a_prompt_and_room(prompt: range, max_len: int) -> None:
    with pytest.raises(AssertionError, match="no prompt, or no room"):
        make_request(prompt, max_len)
