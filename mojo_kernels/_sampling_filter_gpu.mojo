"""GPU path of `mili.sample`, the threshold that top_k and top_p put on a row, by histograms in shared memory."""

from std.bit import count_trailing_zeros

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


@always_inline
def _prefix_sum(value: UInt64) -> UInt64:
    """The sum over the lanes up to this one."""
    var total = value
    comptime for step in range(5):
        var low = warp.shuffle_up(total.cast[U32](), UInt32(1 << step))
        var high = warp.shuffle_up((total >> 32).cast[U32](), UInt32(1 << step))
        if lane_id() >= 1 << step:
            total += low.cast[U64]() | (high.cast[U64]() << 32)
    return total


@always_inline
def _lane_that_reaches[
    column: Int
](goal: UInt64, own_count: UInt64, own_mass: UInt64, mut count: UInt64, mut mass: UInt64) -> Int:
    """The first lane, or else the last, through which count or mass reaches goal; adds the lanes ahead of it to both."""
    var counts = _prefix_sum(own_count)
    var masses = _prefix_sum(own_mass)
    var through = mass + masses if column == MASS else count + counts
    var lane = min(Int(count_trailing_zeros(warp.vote[U32](through >= goal))), WARP_SIZE - 1)
    count += _of_lane(counts - own_count, lane)
    mass += _of_lane(masses - own_mass, lane)
    return lane


@always_inline
def _of_lane(value: UInt64, lane: Int) -> UInt64:
    var low = warp.shuffle_idx(value.cast[U32](), UInt32(lane))
    var high = warp.shuffle_idx((value >> 32).cast[U32](), UInt32(lane))
    return low.cast[U64]() | (high.cast[U64]() << 32)


def _find[column: Int](words: Words, bins: Int, goal: UInt64, mut count: UInt64, mut mass: UInt64) -> Int:
    """The first bin where count or mass (as column says) reaches goal; adds the bins ahead of it to both.

    Leaves the mass of the bin itself in RESULT. The warps sum 32 bins each; one warp finds the warp, then the bin.
    """
    comptime assert BINS == WARPS * WARP_SIZE and WARPS == WARP_SIZE, "a lane for each warp, and for each of its bins"
    var own = bins + thread_idx.x
    var warp_count = _warp_sum(words[unsafe_offset=own])
    var warp_mass = _warp_sum(_wide(words, own + BINS, own + 2 * BINS))
    if lane_id() == 0:
        words[unsafe_offset=WARP_COUNTS + warp_id()] = warp_count
        _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), warp_mass)
    barrier()
    if warp_id() == 0:
        var counts = words[unsafe_offset=WARP_COUNTS + lane_id()].cast[U64]()
        var masses = _wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id())
        var bin = _lane_that_reaches[column](goal, counts, masses, count, mass) * WARP_SIZE
        var at = bins + bin + lane_id()
        counts = words[unsafe_offset=at].cast[U64]()
        masses = _wide(words, at + BINS, at + 2 * BINS)
        bin += _lane_that_reaches[column](goal, counts, masses, count, mass)
        if lane_id() == bin % WARP_SIZE:
            words[unsafe_offset=RESULT] = UInt32(bin)
            words[unsafe_offset=RESULT + 1] = count.cast[U32]()
            _store_wide(words, RESULT + 2, RESULT + 3, mass)
            _store_wide(words, RESULT + 4, RESULT + 5, masses)
    barrier()
    count = words[unsafe_offset=RESULT + 1].cast[U64]()
    mass = _wide(words, RESULT + 2, RESULT + 3)
    return Int(words[unsafe_offset=RESULT])


@fieldwise_init
struct Place(TrivialRegisterPassable):
    """The bin of the scaled logit in which a goal is reached."""

    var bin: Int
    var num: Int  # tokens in it
    var count: UInt64  # of the tokens in the bins ahead
    var mass: UInt64


def _locate[
    ALIGN: Int, C: Int, column: Int
](words: Words, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, goal: UInt64) -> Place:
    """Where count or mass reaches goal; takes the first histogram from FIRST, and a second one far from the likeliest."""
    var count = UInt64(0)
    var mass = UInt64(0)
    var bins = FIRST
    var bin = _find[column](words, bins, goal, count, mass)
    if bin == NEAR_BINS:
        bins = OTHER
        _histogram[ALIGN, C](words, bins, x, v, top, inverse, NEAR_BINS, BINS - 1)
        bin = _find[column](words, bins, goal, count, mass)
    return Place(bin, Int(words[unsafe_offset=bins + bin]), count, mass)


def _refine[
    ALIGN: Int, C: Int, column: Int
](
    words: Words,
    x: Ptr[F32],
    v: Int,
    top_key: UInt32,
    inverse: Float32,
    goal: UInt64,
    place: Place,
    mut reached: UInt64,
) -> UInt32:
    """The largest key such that the tokens with that key or more reach goal; sets reached to their mass.

    See `_threshold` of the CPU path. The first histogram, in FIRST, is kept.
    """
    var top = _key_value(top_key)
    var count = place.count
    var mass = place.mass
    if thread_idx.x < 2:  # thread 0: the bin's lowest key; thread 1: that of the bin above
        var of_bin = place.bin - thread_idx.x
        var low_key = _bin_low_key(of_bin, top_key, inverse) if of_bin >= 0 else top_key + 1
        words[unsafe_offset=RESULT + 6 + thread_idx.x] = low_key
    barrier()
    var low = words[unsafe_offset=RESULT + 6]
    var high = words[unsafe_offset=RESULT + 7] - 1
    while True:
        var shift = _digit_shift(high - low)
        _digit_histogram[ALIGN, C](words, x, v, top, inverse, high, high - low, shift)
        var digit = _find[column](words, OTHER, goal, count, mass)
        high -= UInt32(digit) << shift
        if shift == 0:
            reached = mass + _wide(words, RESULT + 4, RESULT + 5)
            return high
        low = max(low, high - ((UInt32(1) << shift) - 1))


def _filter[
    ALIGN: Int, C: Int, column: Int
](
    words: Words,
    x: Ptr[F32],
    v: Int,
    top_key: UInt32,
    inverse: Float32,
    top_p: Float32,
    goal: UInt64,
    place: Place,
) -> UInt32:
    """The lowest key that top_k (column COUNT) and then top_p keep; goal and place are those of the first of them."""
    var total = UInt64(0)
    var key = _refine[ALIGN, C, column](words, x, v, top_key, inverse, goal, place, total)
    if column == COUNT and top_p < 1:
        var mass_goal = _top_p_goal(total, top_p)
        var other = _locate[ALIGN, C, MASS](words, x, v, _key_value(top_key), inverse, mass_goal)
        key = _refine[ALIGN, C, MASS](words, x, v, top_key, inverse, mass_goal, other, total)
    return key
