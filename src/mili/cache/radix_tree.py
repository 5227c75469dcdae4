"""Prefix tree over whole pages: which runs of tokens are already computed, and in which pages.

It knows token ids and page ids; it knows no requests and no free list, so a page it gives up is returned to the caller.
Invariant: the path from the root to a node spells the tokens whose keys and values its pages hold, no two children of a
node begin with the same page of tokens, and a node is locked at least as often as each of its children, so that
evicting from an unlocked leaf never breaks a locked path.

    root ── [sys|tem|pro]  locks 2 ──┬── [you|are]  locks 1      a node is a run of whole pages: "sys" is one page
                                     └── [tell]     locks 1      and keys its node among the parent's children

Source: RadixAttention (Zheng et al. 2023); here the unit is a page, not a token, so pages are never split.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Tokens: TypeAlias = tuple[int, ...]


@dataclass(eq=False, slots=True)
class RadixNode:
    """A run of whole pages below `parent`; mutated by `RadixTree` only."""

    parent: "RadixNode | None"  # None for the root, and for a node that was evicted
    tokens: Tokens  # len(pages) * page_size
    pages: list[int]
    children: "dict[Tokens, RadixNode]" = field(default_factory=dict)  # keyed by a child's first page of tokens
    lock_count: int = 0  # locks on this node and below it
    last_access: int = 0  # logical clock, not wall time
    queued: bool = False  # has an entry in the eviction queue


class RadixTree:
    """Longest-prefix match, insertion, locking and least-recently-used eviction."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.root = RadixNode(parent=None, tokens=(), pages=[])
        self.num_pages = 0
        self.num_evictable = 0  # pages in nodes without locks
        self._clock = 0
        self._num_queued = 0
        # (last_access, tie-break, node): every unlocked leaf has one entry, maybe out of date until it is popped.
        self._eviction_queue: list[tuple[int, int, RadixNode]] = []

    def match(self, token_ids: Sequence[int], max_pages: int) -> tuple[RadixNode, list[int]]:
        """Finds the longest cached prefix of `token_ids`, of at most `max_pages` pages.

        A node that matches in part is split, so that the returned node ends exactly where the match ends. Nothing is
        locked and no access time changes.

        Returns:
            The last node of the match (the root if there is none) and the pages of the whole match, in order.
        """
        num_pages = min(len(token_ids) // self.page_size, max_pages)
        return self._descend(self.root, tuple(token_ids[: num_pages * self.page_size]))

    def insert(self, node: RadixNode, tokens: Tokens, pages: list[int]) -> tuple[RadixNode, list[int]]:
        """Adds the run `tokens`, held by `pages`, below `node`.

        Where the tree already has the beginning of the run it keeps its own pages, and the caller keeps as many of
        `pages`; it owns the rest from now on.

        Args:
            node: Where the run starts: a node of this tree.
            tokens: `len(pages) * page_size` token ids.
            pages: The pages holding them.

        Returns:
            The node the run ends at, and the tree's own pages for the beginning of the run: the first
            `len(returned pages)` of `pages` are duplicates.
        """
        assert len(tokens) == len(pages) * self.page_size
        end, existing = self._descend(node, tokens)
        if len(existing) < len(pages):
            self._clock += 1
            new_tokens = tokens[len(existing) * self.page_size :]
            leaf = RadixNode(parent=end, tokens=new_tokens, pages=pages[len(existing) :], last_access=self._clock)
            end.children[new_tokens[: self.page_size]] = leaf
            self.num_pages += len(leaf.pages)
            self.num_evictable += len(leaf.pages)
            self._queue_if_evictable(leaf)
            end = leaf
        return end, existing

    def lock(self, node: RadixNode, above: RadixNode | None = None) -> None:
        """Pins the path down to `node` against eviction and marks it as used now.

        With `above`, an ancestor that the caller has locked already, the path starts below it: the caller's lock moves
        from `above` to `node`.
        """
        self._clock += 1
        for step in self._path_up(node, above or self.root):
            if step.lock_count == 0:
                self.num_evictable -= len(step.pages)
            step.lock_count += 1
            step.last_access = self._clock

    def unlock(self, node: RadixNode) -> None:
        """Takes back one `lock` of the path down to `node` and marks it as used now."""
        self._clock += 1
        for step in self._path_up(node, self.root):
            assert step.lock_count > 0, "unlock without lock"
            step.lock_count -= 1
            step.last_access = self._clock
            if step.lock_count == 0:
                self.num_evictable += len(step.pages)
                self._queue_if_evictable(step)

    def evict(self, num_pages: int) -> list[int]:
        """Removes up to `num_pages` pages from unlocked leaves, least recently used first, each from its end.

        Returns:
            The removed pages, the caller's from now on; fewer than asked only if the rest is locked.
        """
        evicted: list[int] = []
        while len(evicted) < num_pages and self._eviction_queue:
            queued_at, _, node = heapq.heappop(self._eviction_queue)
            node.queued = False
            if node.lock_count or node.children or queued_at != node.last_access:
                self._queue_if_evictable(node)  # if it is: used since, so it goes where it belongs by now
                continue
            num_kept = max(0, len(node.pages) - (num_pages - len(evicted)))
            evicted += reversed(node.pages[num_kept:])
            self.num_pages -= len(node.pages) - num_kept
            self.num_evictable -= len(node.pages) - num_kept
            self._truncate(node, num_kept)
        return evicted

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()

    def check_invariants(self) -> None:
        """Asserts what the module docstring promises, and that the counts are right; visits every node."""
        num_pages = num_evictable = 0
        for node in self.nodes():
            assert node.pages and len(node.tokens) == len(node.pages) * self.page_size, "a node is not whole pages"
            assert node.parent is not None and node.parent.children[node.tokens[: self.page_size]] is node
            assert node.parent is self.root or node.parent.lock_count >= node.lock_count, "a lock skips an ancestor"
            assert node.lock_count or node.children or node.queued, "an unlocked leaf can never be evicted"
            num_pages += len(node.pages)
            num_evictable += 0 if node.lock_count else len(node.pages)
        assert (self.num_pages, self.num_evictable) == (num_pages, num_evictable), "page counts are wrong"

    def _descend(self, node: RadixNode, tokens: Tokens) -> tuple[RadixNode, list[int]]:
        """Follows `tokens` (whole pages) down from `node` as far as the tree goes; splits where it ends mid-node."""
        pages: list[int] = []
        position = 0
        while position < len(tokens):
            child = node.children.get(tokens[position : position + self.page_size])
            if child is None:
                break
            num_common = self._num_common_pages(child, tokens, position)
            if num_common < len(child.pages):
                child = self._split(child, num_common)
            pages += child.pages
            position += len(child.tokens)
            node = child
        return node, pages

    def _num_common_pages(self, node: RadixNode, tokens: Tokens, position: int) -> int:
        """How many pages of `node` agree with `tokens` from `position` on; the first is known to."""
        if tokens[position : position + len(node.tokens)] == node.tokens:
            return len(node.pages)
        size = self.page_size
        num_common = 1
        while True:
            start = num_common * size
            page = tokens[position + start : position + start + size]
            if not page or page != node.tokens[start : start + size]:
                return num_common
            num_common += 1

    def _split(self, node: RadixNode, num_pages: int) -> RadixNode:
        """Moves the first `num_pages` pages of `node` into a new parent, which is returned.

        `node` itself stays the lower part, so whoever locked it still points at the end of what they locked; their
        locks count for the new parent too.
        """
        assert 0 < num_pages < len(node.pages) and node.parent is not None
        cut = num_pages * self.page_size
        upper = RadixNode(
            parent=node.parent,
            tokens=node.tokens[:cut],
            pages=node.pages[:num_pages],
            children={node.tokens[cut : cut + self.page_size]: node},
            lock_count=node.lock_count,
            last_access=node.last_access,
        )
        node.parent.children[node.tokens[: self.page_size]] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], node.pages[num_pages:]
        return upper

    def _truncate(self, node: RadixNode, num_pages: int) -> None:
        """Keeps the first `num_pages` pages of an unlocked leaf; with none left the leaf leaves the tree."""
        assert node.parent is not None
        if num_pages:
            node.pages = node.pages[:num_pages]
            node.tokens = node.tokens[: num_pages * self.page_size]
            self._queue_if_evictable(node)
        else:
            parent = node.parent
            del parent.children[node.tokens[: self.page_size]]
            node.parent = None
            self._queue_if_evictable(parent)

    def _queue_if_evictable(self, node: RadixNode) -> None:
        if node.parent is None or node.lock_count or node.children or node.queued:
            return
        node.queued = True
        self._num_queued += 1
        heapq.heappush(self._eviction_queue, (node.last_access, self._num_queued, node))

    def _path_up(self, node: RadixNode, above: RadixNode) -> Iterator[RadixNode]:
        """`node` and its ancestors below `above`, bottom to top."""
        while node is not above:
            assert node.parent is not None, "the path does not lead there: the node was evicted, or is elsewhere"
            yield node
            node = node.parent
