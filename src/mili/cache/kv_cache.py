"""Pages of one request at a time: the only view of the cache that the scheduler has.

It knows token ids and pages; it knows no requests, tensors or devices.
Invariant: every page has exactly one owner: the free list, one lease (its private tail) or the radix tree (a prefix
that leases share by locking its node). So pages need no reference counts, and preemption is just `release`.

    lease.page_table   [ t0 | t1 | t2 | p0 | p1 | p2 ]      t: the tree's pages, p: private, page i holds the
                         num_shared ─────^          ^       tokens [i*page_size, (i+1)*page_size)
                         node ends here ─┘          └─ num_pages

`commit` hands full private pages to the tree. Where another request was first with the same tokens, the tree has its
own page already; ours is a duplicate, so the table takes the tree's page and ours goes back to the free list.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mili.cache.page_pool import PagePool
from mili.cache.radix_tree import RadixNode, RadixTree, Tokens

# A page of tokens by its place in the tree: the node it comes after, and its tokens.
SharedPage: TypeAlias = tuple[RadixNode, Tokens]


@dataclass(eq=False, slots=True)
# --8<-- [start:lease]
class PageLease:
    """What one request holds of the cache; mutated by `KVCache` only."""

    node: RadixNode  # end of the shared prefix, locked while the lease lives
    num_shared: int  # leading pages, owned by the tree
    num_pages: int  # pages held, shared and private
    page_table: npt.NDArray[np.int32]  # [capacity >= num_pages], kept as an array so that a batch copies it in one go
    # --8<-- [end:lease]

    @property
    def pages(self) -> list[int]:
        """The page table as a list of `num_pages` page ids."""
        pages: list[int] = self.page_table[: self.num_pages].tolist()
        return pages


class KVCache:
    """Leases pages to requests, sharing the pages of prefixes that were computed before."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_caching: bool = True) -> None:
        """`num_pages` counts the scratch page 0, which no lease ever holds."""
        assert page_size > 0 and page_size & (page_size - 1) == 0, f"page_size {page_size} is not a power of two"
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = PagePool(num_pages)
        self._tree = RadixTree(page_size)
        self._leases: set[PageLease] = set()

    @property
    def num_usable_pages(self) -> int:
        """Pages there are for requests: all but the scratch page."""
        return self._pool.num_usable

    @property
    def num_free_pages(self) -> int:
        """Pages that hold nothing."""
        return self._pool.num_free

    @property
    def num_evictable_pages(self) -> int:
        """Pages of cached prefixes that no lease uses."""
        return self._tree.num_evictable

    @property
    def num_cached_pages(self) -> int:
        """Pages owned by the tree, in use or not."""
        return self._tree.num_pages

    @property
    def usage(self) -> float:
        """Share of the pages that leases hold, 0 to 1; prefixes kept for later do not count."""
        return 1 - (self.num_free_pages + self.num_evictable_pages) / self.num_usable_pages

    def acquire(self, token_ids: Sequence[int]) -> PageLease:
        """Opens a lease on the longest cached prefix of `token_ids` and locks it.

        At least one token is left out of the match, because a step must compute something to have logits to sample
        from. No pages are taken; `grow` does that.
        """
        max_pages = (len(token_ids) - 1) // self.page_size if self.enable_prefix_caching else 0
        node, pages = self._tree.match(token_ids, max_pages)
        self._tree.lock(node)
        page_table = np.array(pages, dtype=np.int32)  # [num_shared]
        lease = PageLease(node=node, num_shared=len(pages), num_pages=len(pages), page_table=page_table)
        self._leases.add(lease)
        return lease

    def grow(self, lease: PageLease, num_tokens: int, headroom: int = 0) -> bool:
        """Makes room for `num_tokens` tokens in all, evicting unused prefixes if needed.

        Args:
            lease: An open lease.
            num_tokens: Tokens the lease must have room for, those it holds included.
            headroom: Pages that must still be free or evictable afterwards, if any are taken.

        Returns:
            False, with nothing changed, if there are too few free and evictable pages.
        """
        num_new = -(-num_tokens // self.page_size) - lease.num_pages
        if num_new <= 0:
            return True
        num_missing = num_new - self._pool.num_free
        if num_missing + headroom > self._tree.num_evictable:
            return False
        if num_missing > 0:
            self._pool.free(self._tree.evict(num_missing))
        end = lease.num_pages + num_new
        if end > len(lease.page_table):
            page_table = np.zeros(max(end, 2 * len(lease.page_table)), dtype=np.int32)  # [capacity]
            page_table[: lease.num_pages] = lease.page_table[: lease.num_pages]
            lease.page_table = page_table
        lease.page_table[lease.num_pages : end] = self._pool.allocate(num_new)
        lease.num_pages = end
        return True

    def commit(self, lease: PageLease, computed_token_ids: Sequence[int]) -> None:
        """Shares the full pages of `computed_token_ids`, the tokens whose keys and values the lease's pages now hold.

        They become the tree's, locked by this lease. Duplicates are swapped for the tree's pages, so the page table may
        change. Does nothing without prefix caching.
        """
        first, last = lease.num_shared, len(computed_token_ids) // self.page_size
        if not self.enable_prefix_caching or last <= first:
            return
        private: list[int] = lease.page_table[first:last].tolist()
        tokens = tuple(computed_token_ids[first * self.page_size : last * self.page_size])
        node, existing = self._tree.insert(lease.node, tokens, private)
        self._tree.lock(node, above=lease.node)
        lease.page_table[first : first + len(existing)] = existing
        self._pool.free(private[: len(existing)])
        lease.node, lease.num_shared = node, last

    def would_swap(self, lease: PageLease, computed_token_ids: Sequence[int]) -> bool:
        """Whether `commit` would find that the tree has one of the pages already, as things are now."""
        start = lease.num_shared * self.page_size
        end = start + self.page_size
        if not self.enable_prefix_caching or end > len(computed_token_ids):
            return False
        return tuple(computed_token_ids[start:end]) in lease.node.children

    def release(self, lease: PageLease, computed_token_ids: Sequence[int]) -> None:
        """Ends the lease: commits, frees the private pages and unlocks the shared ones, which stay cached."""
        self.commit(lease, computed_token_ids)
        self._pool.free(lease.page_table[lease.num_shared : lease.num_pages].tolist())
        self._tree.unlock(lease.node)
        self._leases.remove(lease)

    def next_shared_page(self, lease: PageLease, token_ids: Sequence[int]) -> SharedPage | None:
        """Identifies the next page of `token_ids` that another request could reuse once this lease has committed it.

        Two leases with equal keys are about to compute the same page. None if no further page could be shared.
        """
        start = lease.num_shared * self.page_size
        end = start + self.page_size
        if not self.enable_prefix_caching or end >= len(token_ids):
            return None
        return lease.node, tuple(token_ids[start:end])

    def reset(self) -> int:
        """Forgets every cached prefix that no lease uses; returns the number of pages freed."""
        pages = self._tree.evict(self._tree.num_evictable)
        self._pool.free(pages)
        return len(pages)

    def check_invariants(self) -> None:
        """Asserts that each page has one owner and each node the locks of the leases below it; visits everything."""
        self._tree.check_invariants()
        owned = self._pool.free_pages()
        expected_locks: Counter[RadixNode] = Counter()
        for lease in self._leases:
            pages = lease.pages
            owned += pages[lease.num_shared :]
            node, path = lease.node, []
            while node.parent is not None:
                expected_locks[node] += 1
                path.append(node)
                node = node.parent
            assert node is self._tree.root, "a lease points at an evicted node"
            shared = [page for node in reversed(path) for page in node.pages]
            assert pages[: lease.num_shared] == shared, "a lease's shared pages are not its node's"
        for node in self._tree.nodes():
            owned += node.pages
            assert node.lock_count == expected_locks[node], "a node's locks are not those of the leases below it"
        assert sorted(owned) == list(range(1, self._pool.num_pages)), "a page has no owner, or two"
