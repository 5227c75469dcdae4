"""The paged KV cache's bookkeeping: a pool of page ids, a radix tree of shared prefixes, leases on both."""

from mili.cache.kv_cache import KVCache, PageLease, SharedPage
from mili.cache.page_pool import PagePool
from mili.cache.radix_tree import RadixNode, RadixTree

__all__ = ["KVCache", "PageLease", "PagePool", "RadixNode", "RadixTree", "SharedPage"]
