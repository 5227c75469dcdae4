"""Random walks over a `RadixTree` beside the obvious model: a dict from each cached prefix to its page."""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mili.cache.radix_tree import RadixNode, RadixTree

PAGE_SIZE = 2
# Few distinct pages, so that runs share beginnings and nodes split.
PAGE = st.sampled_from([(0, 0), (0, 1), (1, 0)])
RUN = st.lists(PAGE, min_size=1, max_size=5).map(lambda pages: sum(pages, ()))

MACHINE_SETTINGS = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None)


@dataclass
class ModelPage:
    page: int
    last_access: int
    locks: int = 0


class RadixTreeMachine(RuleBasedStateMachine):
    tree_class: type[RadixTree] = RadixTree

    def __init__(self) -> None:
        super().__init__()
        self.tree = self.tree_class(PAGE_SIZE)
        self.model: dict[tuple[int, ...], ModelPage] = {}  # by the whole prefix that ends with the page
        self.locks: list[tuple[RadixNode, tuple[int, ...]]] = []
        self.clock = 0
        self.next_page = 1

    @rule(run=RUN)
    def insert(self, run: tuple[int, ...]) -> None:
        self._insert(self.tree.root, (), run)

    @rule(run=RUN, max_pages=st.integers(0, 5))
    def match(self, run: tuple[int, ...], max_pages: int) -> None:
        node, pages = self.tree.match(list(run), max_pages)
        matched = self._longest(run, max_pages)
        assert pages == [self.model[prefix].page for prefix in prefixes(matched)]
        assert spelling(node) == matched

    @precondition(lambda self: len(self.locks) < 4)
    @rule(run=RUN)
    def lock(self, run: tuple[int, ...]) -> None:
        node, _ = self.tree.match(run, len(run))
        self.tree.lock(node)
        matched = self._longest(run, len(run))
        self._add_locks(prefixes(matched), 1)
        self.locks.append((node, matched))

    @precondition(lambda self: self.locks)
    @rule(which=st.integers(0, 3), run=RUN)
    def insert_below_a_lock_and_move_it(self, which: int, run: tuple[int, ...]) -> None:
        node, prefix = self.locks.pop(which % len(self.locks))
        end = self._insert(node, prefix, run)
        self.tree.lock(end, above=node)
        self._add_locks(prefixes(prefix + run)[len(prefix) // PAGE_SIZE :], 1)
        self.locks.append((end, prefix + run))

    @precondition(lambda self: self.locks)
    @rule(which=st.integers(0, 3))
    def unlock(self, which: int) -> None:
        node, prefix = self.locks.pop(which % len(self.locks))
        self.tree.unlock(node)
        self._add_locks(prefixes(prefix), -1)

    @rule(num_pages=st.integers(0, 6))
    def evict(self, num_pages: int) -> None:
        expected: list[int] = []
        while len(expected) < num_pages:
            leaves = [prefix for prefix, page in self.model.items() if not page.locks and not self._has_child(prefix)]
            if not leaves:
                break
            oldest = min(leaves, key=lambda prefix: self.model[prefix].last_access)
            expected.append(self.model.pop(oldest).page)
        assert self.tree.evict(num_pages) == expected

    @invariant()
    def counts_and_locks_agree(self) -> None:
        self.tree.check_invariants()
        assert self.tree.num_pages == len(self.model)
        assert self.tree.num_evictable == sum(not page.locks for page in self.model.values())
        for node in self.tree.nodes():
            for prefix in prefixes(spelling(node))[-len(node.pages) :]:
                assert self.model[prefix].locks == node.lock_count
        for node, prefix in self.locks:
            assert spelling(node) == prefix

    def _insert(self, node: RadixNode, prefix: tuple[int, ...], run: tuple[int, ...]) -> RadixNode:
        count = len(run) // PAGE_SIZE
        pages = list(range(self.next_page, self.next_page + count))
        self.next_page += count
        end, existing = self.tree.insert(node, run, pages)
        below = prefixes(prefix + run)[len(prefix) // PAGE_SIZE :]
        assert existing == [self.model[known].page for known in below if known in self.model]
        self.clock += 1
        for known, page in zip(below, pages, strict=True):
            self.model.setdefault(known, ModelPage(page, self.clock))
        assert spelling(end) == prefix + run
        return end

    def _add_locks(self, path: list[tuple[int, ...]], change: int) -> None:
        self.clock += 1
        for prefix in path:
            self.model[prefix].locks += change
            self.model[prefix].last_access = self.clock

    def _longest(self, run: tuple[int, ...], max_pages: int) -> tuple[int, ...]:
        return max((p for p in [(), *prefixes(run)[:max_pages]] if not p or p in self.model), key=len)

    def _has_child(self, prefix: tuple[int, ...]) -> bool:
        return any(len(p) == len(prefix) + PAGE_SIZE and p[: len(prefix)] == prefix for p in self.model)


def prefixes(run: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every prefix of whole pages, shortest first, without the empty one."""
    return [run[:end] for end in range(PAGE_SIZE, len(run) + 1, PAGE_SIZE)]


def spelling(node: RadixNode) -> tuple[int, ...]:
    """The tokens on the path from the root to the end of `node`."""
    return (spelling(node.parent) + node.tokens) if node.parent is not None else ()
