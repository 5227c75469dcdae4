"""Random walks over a `KVCache` beside a shadow of the device: what each slot would hold.

The four invariants: (1) every page has one owner; (2) every node's lock count is the number of leases at or below it;
(3) what each slot holds is what each request believes it holds; (4) every request has a token left to compute. (1) and
(2) are `KVCache.check_invariants`; (3) and (4) are here.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mili.cache import KVCache, PageLease

PAGE_SIZE = 2
NUM_PAGES = 10
MAX_LIVE = 4
# The keys and values of a token depend on all tokens up to it, so a slot's shadow is that whole prefix.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
WHICH = st.integers(0, MAX_LIVE - 1)

MACHINE_SETTINGS = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None)


@dataclass
class Shadow:
    """A request as the test sees it."""

    lease: PageLease
    token_ids: list[int]
    num_computed: int = field(default=0)


class KVCacheMachine(RuleBasedStateMachine):
    cache_class: type[KVCache] = KVCache
    enable_prefix_caching = True

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.cache_class(NUM_PAGES, PAGE_SIZE, self.enable_prefix_caching)
        self.slots: dict[int, tuple[int, ...]] = {}
        self.live: list[Shadow] = []

    @precondition(lambda self: len(self.live) < MAX_LIVE)
    @rule(token_ids=TOKENS)
    def acquire(self, token_ids: list[int]) -> None:
        lease = self.cache.acquire(token_ids)
        assert lease.num_shared == lease.num_pages
        assert self.enable_prefix_caching or not lease.num_shared
        self.live.append(Shadow(lease, token_ids, lease.num_shared * PAGE_SIZE))

    @precondition(lambda self: self.live)
    @rule(which=WHICH, num_tokens=st.integers(1, 9), headroom=st.integers(0, 2), commit=st.booleans())
    def compute(self, which: int, num_tokens: int, headroom: int, commit: bool) -> None:
        request = self.live[which % len(self.live)]
        cache, lease = self.cache, request.lease
        end = min(request.num_computed + num_tokens, len(request.token_ids))
        num_new = max(0, -(-end // PAGE_SIZE) - lease.num_pages)
        num_available = cache.num_free_pages + cache.num_evictable_pages
        before = lease.pages
        grown = cache.grow(lease, end, headroom)
        assert grown == (not num_new or num_new + headroom <= num_available)
        assert lease.pages[: len(before)] == before
        if not grown:
            assert lease.pages == before
            return
        for position in range(request.num_computed, end):
            assert position >= lease.num_shared * PAGE_SIZE, "a shared page would be written to"
            self.slots[slot(lease, position)] = tuple(request.token_ids[: position + 1])
        request.num_computed = end
        if commit:
            cache.commit(lease, request.token_ids[:end])
        if end == len(request.token_ids):
            request.token_ids.append(end % 2)  # sampled, not computed yet

    @precondition(lambda self: self.live)
    @rule(which=WHICH)
    def release(self, which: int) -> None:
        request = self.live.pop(which % len(self.live))
        self.cache.release(request.lease, request.token_ids[: request.num_computed])

    @rule()
    def reset(self) -> None:
        num_evictable = self.cache.num_evictable_pages
        assert self.cache.reset() == num_evictable
        assert self.cache.num_evictable_pages == 0

    @invariant()
    def each_page_has_one_owner_and_locks_are_leases(self) -> None:
        self.cache.check_invariants()

    @invariant()
    def slots_hold_what_requests_believe(self) -> None:
        for request in self.live:
            for position in range(request.num_computed):
                assert self.slots[slot(request.lease, position)] == tuple(request.token_ids[: position + 1])

    @invariant()
    def a_token_is_left_to_compute(self) -> None:
        for request in self.live:
            assert request.num_computed < len(request.token_ids)

    def teardown(self) -> None:
        while self.live:
            self.release(0)
        assert self.cache.usage == 0
        if not self.enable_prefix_caching:
            assert self.cache.num_free_pages == self.cache.num_usable_pages


def slot(lease: PageLease, position: int) -> int:
    return lease.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
