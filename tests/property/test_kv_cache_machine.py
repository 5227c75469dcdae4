"""The four KV cache invariants hold after every step of random lives of requests."""

from support.kv_cache_machine import MACHINE_SETTINGS, KVCacheMachine


class _WithoutPrefixCaching(KVCacheMachine):
    enable_prefix_caching = False


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = MACHINE_SETTINGS
TestKVCacheWithoutPrefixCaching = _WithoutPrefixCaching.TestCase
TestKVCacheWithoutPrefixCaching.settings = MACHINE_SETTINGS
