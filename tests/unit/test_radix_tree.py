"""`RadixTree` by example; the random walk beside a model is in tests/property."""

import pytest

from mili.cache import RadixNode, RadixTree

SYSTEM, YOU_ARE, TELL = (1, 1, 2, 2), (3, 3), (4, 4)  # two, one and one pages of two tokens


@pytest.fixture
def tree() -> RadixTree:
    tree = RadixTree(page_size=2)
    tree.insert(tree.root, SYSTEM + YOU_ARE, [10, 11, 12])
    tree.insert(tree.root, SYSTEM + TELL, [20, 21, 22])
    tree.check_invariants()
    return tree


def find(tree: RadixTree, tokens: tuple[int, ...]) -> RadixNode:
    node, pages = tree.match(tokens, max_pages=99)
    assert len(pages) * 2 == len(tokens)
    return node


def test_the_first_pages_of_a_shared_beginning_stay(tree: RadixTree) -> None:
    assert tree.match(SYSTEM + YOU_ARE, max_pages=99)[1] == [10, 11, 12]
    assert tree.match(SYSTEM + TELL, max_pages=99)[1] == [10, 11, 22]
    assert tree.num_pages == 4


def test_insert_returns_the_pages_it_did_not_need() -> None:
    tree = RadixTree(page_size=2)
    node, existing = tree.insert(tree.root, SYSTEM, [10, 11])
    assert existing == []
    end, existing = tree.insert(tree.root, SYSTEM + TELL, [20, 21, 22])
    assert existing == [10, 11]
    assert (end.parent, end.pages) == (node, [22])
    assert tree.insert(node, TELL, [30]) == (end, [22])


@pytest.mark.parametrize(
    ("token_ids", "max_pages", "pages"),
    [
        ([], 9, []),
        ([1], 9, []),  # less than a page
        ([1, 2, 1, 2], 9, []),  # agrees in one token, not in a page
        ([1, 1, 2], 9, [10]),  # a page and a half
        ([1, 1, 2, 9, 3, 3], 9, [10]),  # ends inside a node
        ([1, 1, 2, 2, 3, 3, 7, 7], 9, [10, 11, 12]),  # longer than anything cached
        ([1, 1, 2, 2, 3, 3], 2, [10, 11]),
        ([1, 1, 2, 2, 3, 3], 0, []),
    ],
)
def test_match_counts_whole_pages(tree: RadixTree, token_ids: list[int], max_pages: int, pages: list[int]) -> None:
    assert tree.match(token_ids, max_pages)[1] == pages
    tree.check_invariants()


def test_a_partial_match_splits_the_node_at_its_end(tree: RadixTree) -> None:
    node, _ = tree.match([1, 1], max_pages=9)
    assert (node.tokens, node.pages) == ((1, 1), [10])
    assert [child.pages for child in node.children.values()] == [[11]]


def test_a_split_keeps_the_locks_on_both_parts() -> None:
    tree = RadixTree(page_size=2)
    lower, _ = tree.insert(tree.root, SYSTEM, [10, 11])
    tree.lock(lower)
    upper, _ = tree.match([1, 1], max_pages=9)
    assert (upper.lock_count, lower.lock_count, lower.parent) == (1, 1, upper)
    tree.unlock(lower)
    assert (upper.lock_count, lower.lock_count, tree.num_evictable) == (0, 0, 2)


def test_eviction_takes_the_least_recently_used_leaf_from_its_end(tree: RadixTree) -> None:
    node = find(tree, SYSTEM + YOU_ARE)  # the older of the two leaves
    tree.lock(node)
    tree.unlock(node)  # now the newer
    assert tree.evict(1) == [22]
    assert tree.evict(2) == [12, 11]  # a leaf, then the end of the node that became one
    assert tree.match(SYSTEM, max_pages=9)[1] == [10]
    assert tree.evict(5) == [10]
    assert (tree.num_pages, tree.num_evictable, list(tree.nodes())) == (0, 0, [])


def test_a_locked_path_is_not_evicted(tree: RadixTree) -> None:
    node = find(tree, SYSTEM + TELL)
    tree.lock(node)
    assert tree.num_evictable == 1
    assert tree.evict(9) == [12]
    tree.unlock(node)
    assert tree.num_evictable == 3
    assert tree.evict(9) == [22, 11, 10]


def test_locks_add_up(tree: RadixTree) -> None:
    shared, leaf = find(tree, SYSTEM), find(tree, SYSTEM + TELL)
    tree.lock(leaf)
    tree.lock(shared)
    assert (shared.lock_count, leaf.lock_count) == (2, 1)
    tree.lock(leaf, above=shared)  # the second lock moves down
    assert (shared.lock_count, leaf.lock_count) == (2, 2)
    tree.unlock(leaf)
    tree.unlock(leaf)
    with pytest.raises(AssertionError, match="unlock without lock"):
        tree.unlock(leaf)


def test_a_lock_cannot_move_sideways(tree: RadixTree) -> None:
    sibling, leaf = find(tree, SYSTEM + YOU_ARE), find(tree, SYSTEM + TELL)
    tree.lock(sibling)
    with pytest.raises(AssertionError, match="does not lead there"):
        tree.lock(leaf, above=sibling)


def test_an_empty_tree_has_nothing() -> None:
    tree = RadixTree(page_size=4)
    assert tree.match([1, 2, 3, 4], max_pages=1) == (tree.root, [])
    assert tree.evict(3) == []
    tree.lock(tree.root)  # a lease without a match holds the root
    tree.unlock(tree.root)
    tree.check_invariants()
