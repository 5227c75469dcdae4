"""`PagePool`: pages leave once, come back once, and page 0 never leaves."""

import pytest

from mili.cache import PagePool


def test_hands_out_every_page_but_the_scratch_page_once() -> None:
    pool = PagePool(5)
    assert (pool.num_usable, pool.num_free) == (4, 4)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.allocate(1) == [4]
    assert pool.num_free == 0


def test_the_most_recently_freed_page_leaves_first() -> None:
    pool = PagePool(5)
    pool.allocate(4)
    pool.free([2])
    pool.free([4])
    assert pool.num_free == 2
    assert pool.allocate(2) == [4, 2]


def test_no_pages_are_no_pages() -> None:
    pool = PagePool(3)
    assert pool.allocate(0) == []
    pool.free([])
    assert pool.free_pages() == [2, 1]


def test_asking_for_more_than_is_free_is_our_bug() -> None:
    pool = PagePool(3)
    with pytest.raises(AssertionError, match="3 pages asked for, 2 are free"):
        pool.allocate(3)


@pytest.mark.parametrize("page", [0, 2, 3, -1])
def test_freeing_what_was_not_handed_out_is_our_bug(page: int) -> None:
    pool = PagePool(3)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="was not handed out"):
        pool.free([page])


def test_freeing_twice_is_our_bug() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(AssertionError, match="was not handed out"):
        pool.free(pages)


def test_a_pool_needs_a_page_besides_the_scratch_page() -> None:
    with pytest.raises(AssertionError, match="num_pages is 1"):
        PagePool(1)
