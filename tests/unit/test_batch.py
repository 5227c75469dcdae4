"""`ForwardBatch`: the arrays of one step, checked number by number."""

import numpy as np

from mili.batch import ForwardBatch
from mili.cache import KVCache
from mili.request import Request, ScheduledRequest
from mili.sampling_params import SamplingParams

PAGE_SIZE = 4


def running(
    cache: KVCache,
    token_ids: list[int],
    num_computed: int,
    num_prompt: int | None = None,
    prompt_logprobs: bool = False,
) -> Request:
    """A request of `token_ids` with pages for all of them, the first `num_computed` of them computed."""
    params = SamplingParams(prompt_logprobs=0 if prompt_logprobs else None)
    request = Request("r", tuple(token_ids[:num_prompt]), params, max_len=1000)
    request.token_ids = list(token_ids)
    request.num_computed = num_computed
    request.lease = cache.acquire([])
    assert cache.grow(request.lease, len(token_ids))
    return request


def test_a_mixed_batch() -> None:
    cache = KVCache(20, PAGE_SIZE)
    decode = running(cache, list(range(100, 110)), num_computed=9)  # pages 1 2 3
    prefill = running(cache, list(range(200, 206)), num_computed=0)  # pages 4 5
    chunk = running(cache, list(range(300, 312)), num_computed=3)  # pages 6 7 8
    plan = [ScheduledRequest(decode, 1), ScheduledRequest(prefill, 6), ScheduledRequest(chunk, 3)]
    batch = ForwardBatch.build(plan, PAGE_SIZE)
    assert batch.token_ids.tolist() == [109, 200, 201, 202, 203, 204, 205, 303, 304, 305]
    assert batch.positions.tolist() == [9, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert batch.slots.tolist() == [13, 16, 17, 18, 19, 20, 21, 27, 28, 29]
    assert batch.query_starts.tolist() == [0, 1, 7, 10]
    assert batch.seq_lens.tolist() == [10, 6, 6]
    assert batch.page_table.tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 0]]  # only the pages that are in use by then
    assert batch.logit_rows.tolist() == [0, 6]
    assert batch.logit_owners == [(0, "sample", 10), (1, "sample", 6)]
    assert batch.sample_rows.tolist() == [0, 1]
    assert (int(batch.max_query_len), int(batch.max_seq_len)) == (6, 10)


def test_every_array_is_int32_and_contiguous() -> None:
    cache = KVCache(20, PAGE_SIZE)
    plan = [ScheduledRequest(running(cache, [1] * n, 0), n) for n in (1, 5)]
    batch = ForwardBatch.build(plan, PAGE_SIZE)
    arrays = [getattr(batch, name) for name in ForwardBatch.__slots__ if name not in ("logit_owners", "feeds")]
    assert len(arrays) == 8
    for array in arrays:
        assert array.dtype == np.int32 and array.flags.c_contiguous


def test_page_borders() -> None:
    cache = KVCache(20, PAGE_SIZE)
    cache.grow(cache.acquire([]), 5)  # takes pages 1 and 2
    request = running(cache, list(range(9)), num_computed=0)
    for first, num_new, num_pages in [(0, 3, 1), (3, 1, 1), (4, 1, 2), (5, 4, 3), (3, 6, 3)]:
        request.num_computed = first
        batch = ForwardBatch.build([ScheduledRequest(request, num_new)], PAGE_SIZE)
        assert batch.slots.tolist() == [12 + position for position in range(first, first + num_new)]
        assert batch.page_table.shape == (1, num_pages)


def test_nobody_to_sample_from_leaves_one_row_without_an_owner() -> None:
    cache = KVCache(20, PAGE_SIZE)
    batch = ForwardBatch.build([ScheduledRequest(running(cache, [1] * 8, 0), 5)], PAGE_SIZE)
    assert batch.logit_rows.tolist() == [0]
    assert (batch.logit_owners, batch.sample_rows.tolist()) == ([], [])


def test_prompt_logprobs_add_a_row_for_each_position_but_the_last() -> None:
    cache = KVCache(20, PAGE_SIZE)
    decode = running(cache, [1, 2, 3], num_computed=2)
    scored = running(cache, [5, 6, 7, 8, 9], num_computed=0, prompt_logprobs=True)
    first = ForwardBatch.build([ScheduledRequest(decode, 1), ScheduledRequest(scored, 3)], PAGE_SIZE)
    assert first.logit_rows.tolist() == [0, 1, 2, 3]
    assert first.logit_owners == [(0, "sample", 3), (1, "prompt", 1), (1, "prompt", 2), (1, "prompt", 3)]
    assert first.sample_rows.tolist() == [0]
    scored.num_computed = 3
    second = ForwardBatch.build([ScheduledRequest(scored, 2), ScheduledRequest(decode, 1)], PAGE_SIZE)
    assert second.logit_rows.tolist() == [0, 1, 2]
    assert second.logit_owners == [(0, "prompt", 4), (0, "sample", 5), (1, "sample", 3)]
    assert second.sample_rows.tolist() == [1, 2]


def test_positions_scored_before_a_preemption_are_not_scored_again() -> None:
    cache = KVCache(20, PAGE_SIZE)
    request = running(cache, [5, 6, 7, 8, 9, 1, 1], num_computed=0, num_prompt=5, prompt_logprobs=True)
    request.num_prompt_scored = 2
    batch = ForwardBatch.build([ScheduledRequest(request, 7)], PAGE_SIZE)
    assert batch.logit_owners == [(0, "prompt", 3), (0, "prompt", 4), (0, "sample", 7)]
    assert batch.logit_rows.tolist() == [2, 3, 6]


def test_a_prompt_of_one_token_has_no_position_to_score() -> None:
    cache = KVCache(20, PAGE_SIZE)
    request = running(cache, [5], num_computed=0, prompt_logprobs=True)
    batch = ForwardBatch.build([ScheduledRequest(request, 1)], PAGE_SIZE)
    assert batch.logit_owners == [(0, "sample", 1)]
