"""CPU path of `mili.sample`, first half: the threshold that top_k and top_p put on a row, by histograms."""

from ._prelude import *
from ._sampling_math import (
    BINS,
    LOWEST_KEY,
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

comptime W = simd_width_of[F32]()
comptime CHUNK = 2048  # tokens whose masses are summed lane by lane: halves of 20 bits cannot overflow in it
comptime MASS = 0  # columns of a histogram [BINS, 2]
comptime COUNT = 1


@always_inline
def _each[Body: def(Int, SIMD[F32, W]) -> None, //](x: Ptr[F32], start: Int, end: Int, mut body: Body):
    """Calls body(i, logits i..i+W-1); lanes past the end read -inf, which is never counted, chosen or ranked."""
    var i = start
    while i + W <= end:
        body(i, x.unsafe_load[width=W](i))
        i += W
    if i < end:
        body(i, _last(x, i, end))


@always_inline
def _last(x: Ptr[F32], start: Int, end: Int) -> SIMD[F32, W]:
    var logits = SIMD[F32, W](_key_value(LOWEST_KEY))
    for lane in range(end - start):
        logits[lane] = x[unsafe_offset=start + lane]
    return logits


@always_inline
def _sum(high: SIMD[U32, W], low: SIMD[U32, W]) -> UInt64:
    """The sum of masses whose halves were summed lane by lane."""
    return _join(high.cast[U64]().reduce_add(), low.cast[U64]().reduce_add())


@always_inline
def _join_lanes(high: SIMD[U32, W], low: SIMD[U32, W]) -> SIMD[U64, W]:
    return (high.cast[U64]() << 20) + low.cast[U64]()


@always_inline
def _add(bins: Ptr[U64], bin: Int, mass: UInt64, count: UInt64):
    bins.unsafe_store(2 * bin, bins.unsafe_load[width=2](2 * bin) + SIMD[U64, 2](mass, count))


def _histogram(bins: Ptr[U64], x: Ptr[F32], v: Int, top: Float32, inverse: Float32, first: Int32, last: Int32):
    """Counts and masses of tokens over bins first..last of the scaled logit; bins after last go into it."""
    _clear(bins)
    for start in range(0, v, CHUNK):
        var high_sum = SIMD[U32, W](0)  # of the groups of W tokens that are all in bin last
        var low_sum = SIMD[U32, W](0)
        var groups = 0

        def body(i: Int, logits: SIMD[F32, W]) {mut high_sum, mut low_sum, mut groups, imm}:
            var y = _scaled(logits, top, inverse)
            var bin = min(_bin(y), last)
            var counted = bin.ge(first)
            var e = counted.select(_exp(y), SIMD[F32, W](0))
            var high = _mass_high(e)
            var low = _mass_low(e, high)
            if bin.eq(last).reduce_and():
                high_sum += high
                low_sum += low
                groups += 1
            elif counted.reduce_or():
                var mass = _join_lanes(high, low)
                var count = counted.cast[U64]()
                comptime for lane in range(W):
                    _add(bins, Int(bin[lane]), mass[lane], count[lane])

        _each(x, start, min(start + CHUNK, v), body)
        _add(bins, Int(last), _sum(high_sum, low_sum), UInt64(groups * W))


def _digit_histogram(
    bins: Ptr[U64], x: Ptr[F32], v: Int, top: Float32, inverse: Float32, high_key: UInt32, span: UInt32, shift: UInt32
):
    """The same over (high_key - key) >> shift, for the keys high_key - span..high_key alone."""
    _clear(bins)

    def body(i: Int, logits: SIMD[F32, W]) {imm}:
        var below = high_key - _key(logits)
        var inside = below.le(span)
        if inside.reduce_or():
            var e = _exp(_scaled(logits, top, inverse))
            var high = _mass_high(e)
            var mass = _join_lanes(high, _mass_low(e, high))
            var bin = below >> shift
            for lane in range(W):
                if inside[lane]:
                    _add(bins, Int(bin[lane]), mass[lane], 1)

    _each(x, 0, v, body)


def _clear(bins: Ptr[U64]):
    for i in range(BINS):
        bins.unsafe_store(2 * i, SIMD[U64, 2](0))


def _find(bins: Ptr[U64], goal: UInt64, column: Int, mut before: SIMD[U64, 2]) -> Int:
    """The first bin at which a column, `before` included, sums to goal; adds the bins ahead of it to `before`."""
    for bin in range(BINS - 1):
        var through = before + bins.unsafe_load[width=2](2 * bin)
        if through[column] >= goal:
            return bin
        before = through
    return BINS - 1


def _threshold(
    first: Ptr[U64],
    bins: Ptr[U64],
    x: Ptr[F32],
    v: Int,
    top_key: UInt32,
    inverse: Float32,
    goal: UInt64,
    column: Int,
) -> Tuple[UInt32, UInt64]:
    """The largest key such that the tokens with that key or more reach goal (in count or mass), and their mass.

    A radix search from the largest key down: a histogram of scaled logits, `first` or one of what that left out, gives
    a bin, and each histogram of keys, over that bin alone, cuts it into BINS.
    """
    var top = _key_value(top_key)
    var before = SIMD[U64, 2](0)
    var bin = _find(first, goal, column, before)
    if bin == NEAR_BINS:
        _histogram(bins, x, v, top, inverse, NEAR_BINS, BINS - 1)
        bin = _find(bins, goal, column, before)
    var low = _bin_low_key(bin, top_key, inverse)
    var high = top_key if bin == 0 else _bin_low_key(bin - 1, top_key, inverse) - 1
    while True:
        var shift = _digit_shift(high - low)
        _digit_histogram(bins, x, v, top, inverse, high, high - low, shift)
        bin = _find(bins, goal, column, before)
        high -= UInt32(bin) << shift
        if shift == 0:
            return high, before[MASS] + bins[unsafe_offset=2 * bin + MASS]
        low = max(low, high - ((UInt32(1) << shift) - 1))


def _filter(x: Ptr[F32], v: Int, top_key: UInt32, inverse: Float32, top_k: Int, top_p: Float32) -> UInt32:
    """The lowest key that top_k and then top_p keep."""
    if (top_k <= 0 or top_k >= v) and top_p >= 1:
        return 0
    var first_bins = unsafe_stack_allocation[2 * BINS, UInt64, alignment=16]()
    var other_bins = unsafe_stack_allocation[2 * BINS, UInt64, alignment=16]()
    var first = rebind[Ptr[U64]](first_bins)
    var bins = rebind[Ptr[U64]](other_bins)
    _histogram(first, x, v, _key_value(top_key), inverse, 0, NEAR_BINS)
    var key = UInt32(0)
    var total = UInt64(0)
    if 0 < top_k and top_k < v:
        key, total = _threshold(first, bins, x, v, top_key, inverse, UInt64(top_k), COUNT)
    else:
        for bin in range(BINS):
            total += first[unsafe_offset=2 * bin + MASS]
    if top_p < 1:
        key = _threshold(first, bins, x, v, top_key, inverse, _top_p_goal(total, top_p), MASS)[0]
    return key
