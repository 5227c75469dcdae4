"""GPU path of `mili.sample`, log-probabilities: the total, a token's rank, the likeliest tokens."""

from ._prelude import *
from ._sampling_block_gpu import (
    FIRST,
    LIST_IDS,
    LIST_KEYS,
    LIST_LEN,
    VEC,
    Words,
    _all_max,
    _all_sum,
    _each,
    _fetch_add,
    _rank,
)
from ._sampling_few_gpu import _collect, is_few
from ._sampling_filter_gpu import COUNT, _histogram, _locate, _refine
from ._sampling_math import NEAR_BINS, U32, U64, _exp, _join, _key, _key_value, _mass_high, _mass_low, _scaled


def _total_and_rank[
    ALIGN: Int, C: Int
](words: Words, x: Ptr[F32], v: Int, top: Float32, key: UInt32, mut rank: Int) -> UInt64:
    """The sum of exp(x - top) as a mass; sets rank to 1 + the number of keys above this one."""
    var high_sum = SIMD[U32, VEC](0)
    var low_sum = SIMD[U32, VEC](0)
    var above = SIMD[U32, VEC](0)

    def body(i: Int, logits: SIMD[F32, VEC]) {mut high_sum, mut low_sum, mut above, imm}:
        var e = _exp(_scaled(logits, top, Float32(1)))
        var high = _mass_high(e)
        high_sum += high
        low_sum += _mass_low(e, high)
        above += _key(logits).gt(key).cast[U32]()

    _each[ALIGN, C](x, v, body)
    rank = 1 + Int(_all_sum[C](words, above.cast[U64]().reduce_add()))
    return _all_sum[C](words, _join(high_sum.cast[U64]().reduce_add(), low_sum.cast[U64]().reduce_add()))


def _next_of[ALIGN: Int](words: Words, x: Ptr[F32], v: Int, key: UInt32, after: Int) -> Int:
    """The lowest token id above `after` with this key; there must be one."""
    var best = UInt32(0xFFFFFFFF)

    def body(i: Int, logits: SIMD[F32, VEC]) {mut best, imm}:
        var equal = _key(logits).eq(key)
        comptime for lane in range(VEC):
            if equal[lane] and i + lane > after:
                best = min(best, UInt32(i + lane))

    _each[ALIGN, 1](x, v, body)
    return Int(~_all_max[1](words, (~best).cast[U64]()).cast[U32]())


def _list_top[ALIGN: Int, C: Int](words: Words, x: Ptr[F32], v: Int, top_key: UInt32, n: Int):
    """Leaves the n <= V likeliest tokens in LIST_KEYS and LIST_IDS of the first block, in no order.

    Of equal tokens the lowest ids are taken. Unless the candidates are few, the first block alone reads the row once more.
    """
    _histogram[ALIGN, C](words, FIRST, x, v, _key_value(top_key), Float32(1), 0, NEAR_BINS)
    var place = _locate[ALIGN, C, COUNT](words, x, v, _key_value(top_key), Float32(1), UInt64(n))
    if is_few(place):
        _collect[ALIGN, C](words, x, v, top_key, Float32(1), place.bin).list_top(n)
        return
    var mass = UInt64(0)
    var last_key = _refine[ALIGN, C, COUNT](words, x, v, top_key, Float32(1), UInt64(n), place, mass)
    if _rank[C]() > 0:
        return
    if thread_idx.x == 0:
        words[unsafe_offset=LIST_LEN] = 0
    barrier()

    def body(i: Int, logits: SIMD[F32, VEC]) {imm}:
        var keys = _key(logits)
        comptime for lane in range(VEC):
            if keys[lane] > last_key:
                var free = Int(_fetch_add(words, LIST_LEN, 1))
                words[unsafe_offset=LIST_KEYS + free] = keys[lane]
                words[unsafe_offset=LIST_IDS + free] = UInt32(i + lane)

    _each[ALIGN, 1](x, v, body)
    barrier()
    var token = -1
    for i in range(Int(words[unsafe_offset=LIST_LEN]), n):
        token = _next_of[ALIGN](words, x, v, last_key, token)
        if thread_idx.x == 0:
            words[unsafe_offset=LIST_KEYS + i] = last_key
            words[unsafe_offset=LIST_IDS + i] = UInt32(token)
    barrier()
