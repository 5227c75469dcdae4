"""`KVCache` by example; the invariants under random lives of requests are in tests/property."""

import numpy as np
import pytest

from mili.cache import KVCache, PageLease

PROMPT = list(range(10, 20))  # two pages of four tokens, and half of one


@pytest.fixture
def cache() -> KVCache:
    return KVCache(num_pages=9, page_size=4)


def compute(cache: KVCache, token_ids: list[int]) -> PageLease:
    """A lease whose pages hold all of `token_ids`, its full pages shared."""
    lease = cache.acquire(token_ids)
    assert cache.grow(lease, len(token_ids))
    cache.commit(lease, token_ids)
    cache.check_invariants()
    return lease


def test_a_first_request_takes_private_pages(cache: KVCache) -> None:
    lease = cache.acquire(PROMPT)
    assert (lease.num_shared, lease.pages) == (0, [])
    assert cache.grow(lease, 10)
    assert lease.pages == [1, 2, 3]
    assert cache.grow(lease, 12) and lease.pages == [1, 2, 3]  # the third page has room
    assert cache.grow(lease, 13) and lease.pages == [1, 2, 3, 4]
    assert lease.page_table.dtype == np.int32
    assert cache.usage == 4 / 8


def test_a_second_request_shares_full_pages_of_the_prefix(cache: KVCache) -> None:
    first = compute(cache, PROMPT)
    second = cache.acquire(PROMPT)
    assert (second.num_shared, second.pages) == (2, first.pages[:2])
    assert cache.grow(second, 10)
    assert second.pages[2] != first.pages[2]
    cache.check_invariants()
    assert cache.usage == 4 / 8  # two shared, two private


def test_a_swap_is_foretold(cache: KVCache) -> None:
    first = compute(cache, PROMPT)
    second = cache.acquire(PROMPT[:8])  # one page, because a token must be left to compute
    assert cache.grow(second, 8)
    assert not cache.would_swap(second, PROMPT[:7])
    assert not cache.would_swap(second, [*PROMPT[:7], 99])
    assert cache.would_swap(second, PROMPT[:8])
    cache.commit(second, PROMPT[:8])
    assert second.pages == first.pages[:2]
    assert not cache.would_swap(second, PROMPT[:8])


@pytest.mark.parametrize(("length", "num_shared"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (10, 2)])
def test_at_least_one_token_is_left_to_compute(cache: KVCache, length: int, num_shared: int) -> None:
    compute(cache, PROMPT)
    assert cache.acquire(PROMPT[:length]).num_shared == num_shared


def test_duplicates_are_swapped_for_the_trees_pages(cache: KVCache) -> None:
    first, second = cache.acquire(PROMPT), cache.acquire(PROMPT)
    assert cache.grow(first, 10) and cache.grow(second, 10)
    cache.commit(first, PROMPT)
    assert second.pages == [4, 5, 6]
    cache.commit(second, PROMPT)
    assert second.pages == [1, 2, 6]
    assert (second.num_shared, second.node) == (2, first.node)
    assert cache.num_free_pages == 4
    cache.check_invariants()


def test_commit_goes_on_from_the_last_one(cache: KVCache) -> None:
    lease = cache.acquire(PROMPT)
    assert cache.grow(lease, 10)
    for num_computed, num_shared in [(3, 0), (4, 1), (7, 1), (9, 2), (10, 2)]:
        cache.commit(lease, PROMPT[:num_computed])
        assert lease.num_shared == num_shared
        cache.check_invariants()
    assert lease.pages == [1, 2, 3]


def test_release_keeps_full_pages_and_frees_the_tail(cache: KVCache) -> None:
    lease = cache.acquire(PROMPT)
    assert cache.grow(lease, 10)
    cache.release(lease, PROMPT)
    assert (cache.num_cached_pages, cache.num_evictable_pages, cache.num_free_pages, cache.usage) == (2, 2, 6, 0)
    cache.check_invariants()


def test_release_shares_only_what_was_computed(cache: KVCache) -> None:
    lease = cache.acquire(PROMPT)
    assert cache.grow(lease, 10)
    cache.release(lease, PROMPT[:7])
    assert cache.num_cached_pages == 1


def test_grow_evicts_what_nobody_uses(cache: KVCache) -> None:
    cache.release(compute(cache, PROMPT), PROMPT)
    lease = cache.acquire([1])
    assert cache.grow(lease, 4 * 7)  # six were free
    assert (cache.num_free_pages, cache.num_cached_pages) == (0, 1)
    assert cache.acquire(PROMPT).num_shared == 1  # the end of the prefix went first


def test_grow_is_all_or_nothing(cache: KVCache) -> None:
    kept = compute(cache, PROMPT)
    lease = cache.acquire([1])
    assert not cache.grow(lease, 4 * 6)  # five are free, and the cached two are in use
    assert (lease.pages, cache.num_free_pages) == ([], 5)
    cache.release(kept, PROMPT)
    assert cache.grow(lease, 4 * 6)


def test_headroom_stays_free(cache: KVCache) -> None:
    lease = cache.acquire([1])
    assert not cache.grow(lease, 4 * 7, headroom=2)
    assert cache.grow(lease, 4 * 6, headroom=2)
    assert cache.grow(lease, 4 * 6, headroom=9)  # takes none, so asks for none


def test_without_prefix_caching_nothing_is_matched_or_kept() -> None:
    cache = KVCache(num_pages=9, page_size=4, enable_prefix_caching=False)
    lease = compute(cache, PROMPT)
    assert (lease.num_shared, cache.num_cached_pages) == (0, 0)
    assert cache.acquire(PROMPT).num_shared == 0
    assert cache.next_shared_page(lease, PROMPT) is None
    cache.release(lease, PROMPT)
    assert cache.num_free_pages == 8


def test_next_shared_page_tells_who_computes_the_same(cache: KVCache) -> None:
    first, second, other = cache.acquire(PROMPT), cache.acquire([*PROMPT, 1]), cache.acquire([9, *PROMPT])
    assert cache.next_shared_page(first, PROMPT) == cache.next_shared_page(second, [*PROMPT, 1])
    assert cache.next_shared_page(first, PROMPT) != cache.next_shared_page(other, [9, *PROMPT])
    assert cache.next_shared_page(first, PROMPT[:4]) is None  # a match would leave no token to compute
    assert cache.grow(first, 10)
    cache.commit(first, PROMPT)
    assert cache.next_shared_page(first, PROMPT) is None  # two of ten tokens are left


def test_reset_forgets_what_nobody_uses(cache: KVCache) -> None:
    kept = compute(cache, PROMPT)
    branch = [*PROMPT[:4], 1, 2, 3, 4]
    cache.release(compute(cache, branch), branch)
    assert cache.reset() == 1
    assert cache.acquire([*branch, 5]).num_shared == 1
    cache.release(kept, PROMPT)
    cache.check_invariants()


@pytest.mark.parametrize("page_size", [0, 3, 12])
def test_page_size_is_a_power_of_two(page_size: int) -> None:
    with pytest.raises(AssertionError, match="not a power of two"):
        KVCache(num_pages=9, page_size=page_size)


def test_check_invariants_sees_a_lost_page(cache: KVCache) -> None:
    lease = compute(cache, PROMPT)
    lease.num_pages -= 1
    with pytest.raises(AssertionError, match="no owner"):
        cache.check_invariants()
