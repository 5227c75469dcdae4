"""Free list of page ids.

It knows how many pages there are and which are free; it does not know who holds the others, what a page stores, or how
long a page is.
Invariant: a page is handed out at most once until it comes back. Page 0 is never handed out: it is the scratch page
that padding rows write to.
"""

from collections.abc import Iterable


class PagePool:
    """Hands out page ids 1..num_pages-1, the most recently freed first."""

    def __init__(self, num_pages: int) -> None:
        """`num_pages` counts page 0, so `num_pages - 1` can be handed out."""
        assert num_pages >= 2, f"num_pages is {num_pages}: the scratch page and at least one more are needed"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: page 1 leaves first
        self._is_free = bytearray([0] + [1] * (num_pages - 1))  # [num_pages], catches a page freed twice

    @property
    def num_usable(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, which must be free; the caller owns them until `free`."""
        assert 0 <= count <= len(self._free), f"{count} pages asked for, {len(self._free)} are free"
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes back pages that `allocate` handed out."""
        for page in pages:
            assert 0 < page < self.num_pages and not self._is_free[page], f"page {page} was not handed out"
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for the invariant checks."""
        return list(self._free)
