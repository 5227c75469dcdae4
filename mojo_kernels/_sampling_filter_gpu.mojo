"""GPU path of `mili.sample`, the threshold that top_k and top_p put on a row, by histograms in shared memory."""

from ._prelude import *
from ._sampling_block_gpu import (
    FIRST,
    OTHER,
    RESULT,
    THREADS,
    VEC,
    WARPS,
    WARP_COUNTS,
    WARP_HIGHS,
    WARP_LOWS,
    Words,
    _block_sum,
    _each,
    _fetch_add,
    _merge,
    _store_wide,
    _warp_sum,
    _wide,
)
from ._sampling_math import (
    BINS,
    NEAR_BINS,
    U32,
    U64,
    _bin,
    _bin_low_key,
    _digit_shift,
    _exp,
    _join,
    _key,
    _key_value,
    _mass_high,
    _mass_low,
    _scaled,
    _top_p_goal,
)

comptime MASS = 0  # what _find compares with its goal
comptime COUNT = 1


@always_inline
def _add(words: Words, bins: Int, bin: Int, mass: UInt64, count: UInt32):
    """Adds to one bin. The low word tells by its old value whether it carries into the high one."""
    _ = _fetch_add(words, bins + bin, count)
    if mass > 0:
        var low = mass.cast[U32]()
        var high = (mass >> 32).cast[U32]()
        var old = _fetch_add(words, bins + BINS + bin, low)
        if old + low < old:
            high += 1
        if high > 0:
            _ = _fetch_add(words, bins + 2 * BINS + bin, high)


@always_inline
def _clear(words: Words, bins: Int):
    comptime assert BINS == THREADS, "a thread clears its bin"
    comptime for part in range(3):
        words[unsafe_offset=bins + part * BINS + thread_idx.x] = 0
    barrier()


def _histogram[
    ALIGN: Int, C: Int
](words: Words, bins: Int, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, first: Int32, last: Int32):
    """Counts and masses of tokens over bins first..last of the scaled logit; bins after last go into it."""
    _clear(words, bins)
    var high_sum = UInt32(0)  # of this thread's tokens in bin last
    var low_sum = UInt32(0)
    var count = UInt32(0)

    def body(i: Int, logits: SIMD[F32, VEC]) {mut high_sum, mut low_sum, mut count, imm}:
        var y = _scaled(logits, top, inverse)
        var bin = min(_bin(y), last)
        var e = _exp(y)
        var high = _mass_high(e)
        var low = _mass_low(e, high)
        comptime for lane in range(VEC):
            if bin[lane] == last:
                high_sum += high[lane]
                low_sum += low[lane]
                count += 1
            elif bin[lane] >= first:
                _add(words, bins, Int(bin[lane]), _join(high[lane].cast[U64](), low[lane].cast[U64]()), 1)

    _each[ALIGN, C](x, v, body)
    var mass = _warp_sum(_join(high_sum.cast[U64](), low_sum.cast[U64]()))
    count = _warp_sum(count)
    if lane_id() == 0 and count > 0:
        _add(words, bins, Int(last), mass, count)
    _merge[C](words, bins)


def _digit_histogram[
    ALIGN: Int, C: Int
](words: Words, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, high_key: UInt32, span: UInt32, shift: UInt32):
    """The same over (high_key - key) >> shift, for the keys high_key - span..high_key alone, in OTHER."""
    _clear(words, OTHER)

    def body(i: Int, logits: SIMD[F32, VEC]) {imm}:
        var below = high_key - _key(logits)
        comptime for lane in range(VEC):
            if below[lane] <= span:
                var e = _exp(_scaled(SIMD[F32, 1](logits[lane]), top, inverse))
                var high = _mass_high(e)
                var mass = _join(high.cast[U64](), _mass_low(e, high).cast[U64]())
                _add(words, OTHER, Int(below[lane] >> shift), mass, 1)

    _each[ALIGN, C](x, v, body)
    _merge[C](words, OTHER)


def _find[column: Int](words: Words, bins: Int, goal: UInt64, mut count: UInt64, mut mass: UInt64) -> Int:
    """The first bin where count or mass (as column says) reaches goal; adds the bins ahead of it to both.

    Leaves the mass of the bin itself in RESULT. The warps sum 32 bins each, then one warp walks over warps and bins.
    """
    var own = bins + thread_idx.x
    var warp_count = _warp_sum(words[unsafe_offset=own])
    var warp_mass = _warp_sum(_wide(words, own + BINS, own + 2 * BINS))
    if lane_id() == 0:
        words[unsafe_offset=WARP_COUNTS + warp_id()] = warp_count
        _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), warp_mass)
    barrier()
    if warp_id() == 0:
        var before = SIMD[U64, 2](mass, count)
        var group = 0
        while group < WARPS - 1:
            var through = before + SIMD[U64, 2](
                _wide(words, WARP_LOWS + group, WARP_HIGHS + group),
                words[unsafe_offset=WARP_COUNTS + group].cast[U64](),
            )
            if through[column] >= goal:
                break
            before = through
            group += 1
        var bin = group * (BINS // WARPS)
        while bin < BINS - 1:
            var at = bins + bin
            var through = before + SIMD[U64, 2](
                _wide(words, at + BINS, at + 2 * BINS), words[unsafe_offset=at].cast[U64]()
            )
            if through[column] >= goal:
                break
            before = through
            bin += 1
        if lane_id() == 0:
            words[unsafe_offset=RESULT] = UInt32(bin)
            words[unsafe_offset=RESULT + 1] = before[COUNT].cast[U32]()
            _store_wide(words, RESULT + 2, RESULT + 3, before[MASS])
            words[unsafe_offset=RESULT + 4] = words[unsafe_offset=bins + BINS + bin]
            words[unsafe_offset=RESULT + 5] = words[unsafe_offset=bins + 2 * BINS + bin]
    barrier()
    count = words[unsafe_offset=RESULT + 1].cast[U64]()
    mass = _wide(words, RESULT + 2, RESULT + 3)
    return Int(words[unsafe_offset=RESULT])


def _threshold[
    ALIGN: Int, C: Int, column: Int
](words: Words, x: Ptr[F32], v: Int, top_key: UInt32, inverse: Float32, goal: UInt64, mut reached: UInt64) -> UInt32:
    """The largest key such that the tokens with that key or more reach goal; sets reached to their mass.

    See `_threshold` of the CPU path. The first histogram, in FIRST, is kept.
    """
    var top = _key_value(top_key)
    var count = UInt64(0)
    var mass = UInt64(0)
    var bin = _find[column](words, FIRST, goal, count, mass)
    if bin == NEAR_BINS:
        _histogram[ALIGN, C](words, OTHER, x, v, top, inverse, NEAR_BINS, BINS - 1)
        bin = _find[column](words, OTHER, goal, count, mass)
    if thread_idx.x < 2:  # thread 0: the bin's lowest key; thread 1: that of the bin above
        var of_bin = bin - thread_idx.x
        var low_key = _bin_low_key(of_bin, top_key, inverse) if of_bin >= 0 else top_key + 1
        words[unsafe_offset=RESULT + 6 + thread_idx.x] = low_key
    barrier()
    var low = words[unsafe_offset=RESULT + 6]
    var high = words[unsafe_offset=RESULT + 7] - 1
    while True:
        var shift = _digit_shift(high - low)
        _digit_histogram[ALIGN, C](words, x, v, top, inverse, high, high - low, shift)
        bin = _find[column](words, OTHER, goal, count, mass)
        high -= UInt32(bin) << shift
        if shift == 0:
            reached = mass + _wide(words, RESULT + 4, RESULT + 5)
            return high
        low = max(low, high - ((UInt32(1) << shift) - 1))


def _filter[
    ALIGN: Int, C: Int
](words: Words, x: Ptr[F32], v: Int, top_key: UInt32, inverse: Float32, top_k: Int, top_p: Float32) -> UInt32:
    """The lowest key that top_k and then top_p keep."""
    var limited = 0 < top_k and top_k < v
    if not limited and top_p >= 1:
        return 0
    var top = _key_value(top_key)
    _histogram[ALIGN, C](words, FIRST, x, v, top, inverse, 0, NEAR_BINS)
    var key = UInt32(0)
    var total = UInt64(0)
    if limited:
        key = _threshold[ALIGN, C, COUNT](words, x, v, top_key, inverse, UInt64(top_k), total)
    else:
        total = _block_sum(words, _wide(words, FIRST + BINS + thread_idx.x, FIRST + 2 * BINS + thread_idx.x))
    if top_p < 1:
        key = _threshold[ALIGN, C, MASS](words, x, v, top_key, inverse, _top_p_goal(total, top_p), total)
    return key
