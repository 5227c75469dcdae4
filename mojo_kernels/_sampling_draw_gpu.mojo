"""GPU path of `mili.sample`, the draw: argmax, filters, and inverse transform sampling by all threads of the row."""

from ._prelude import *
from ._sampling_block_gpu import (
    FIRST,
    THREADS,
    VEC,
    WARPS,
    WARP_HIGHS,
    WARP_LOWS,
    Words,
    _argmax,
    _block_sum,
    _load,
    _of_peers,
    _rank,
    _store_wide,
    _warp_sum,
    _wide,
)
from ._sampling_few_gpu import _collect, is_few
from ._sampling_filter_gpu import COUNT, MASS, _filter, _histogram, _locate
from ._sampling_math import (
    BINS,
    LOWEST_KEY,
    NEAR_BINS,
    U32,
    U64,
    _exp,
    _join,
    _key,
    _key_value,
    _mass_high,
    _mass_low,
    _multiply_high,
    _random,
    _reciprocal,
    _scaled,
    _top_p_goal,
)


def _draw[
    ALIGN: Int, C: Int
](
    words: Words, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, lowest: UInt32, min_p: Float32, random: UInt64
) -> Int:
    """Inverse transform sampling in the order of token ids, over the masses that the filters keep.

    The blocks of a cluster sum one part of the row each, and all go on in the part in which the random number falls. There the
    warps sum a 32nd of the segment each, the one in which the number falls is the next segment.
    """
    var least = min(max(min_p, Float32(0)), Float32(1))  # so that the likeliest token is kept whatever min_p is

    @always_inline
    def kept(logits: SIMD[F32, VEC]) {imm} -> SIMD[F32, VEC]:
        var e = _exp(_scaled(logits, top, inverse))
        return (_key(logits).ge(lowest) & e.ge(least)).select(e, SIMD[F32, VEC](0))

    @always_inline
    def mass_of(start: Int, end: Int, step: Int) {imm} -> UInt64:
        """What the logits start..start+3, those step later and so on weigh together."""
        var i = start
        var high_sum = SIMD[U32, VEC](0)
        var low_sum = SIMD[U32, VEC](0)
        while i < end:
            var e = kept(_load[ALIGN](x, i, end))
            var high = _mass_high(e)
            high_sum += high
            low_sum += _mass_low(e, high)
            i += step
        return _join(high_sum.cast[U64]().reduce_add(), low_sum.cast[U64]().reduce_add())

    var start = 0
    var end = v
    var rest = UInt64(0)
    comptime if C > 1:
        var part = ceildiv(ceildiv(v, C), VEC) * VEC
        var first = _rank[C]() * part
        var own_mass = mass_of(first + thread_idx.x * VEC, min(first + part, v), THREADS * VEC)
        var masses = _of_peers[C](words, _block_sum(words, own_mass))
        rest = _multiply_high(random, _warp_sum(masses))  # uniform in 0..total-1
        if thread_idx.x < C:
            _store_wide(words, WARP_LOWS + thread_idx.x, WARP_HIGHS + thread_idx.x, masses)
        barrier()
        var mass = _wide(words, WARP_LOWS, WARP_HIGHS)
        while rest >= mass:
            rest -= mass
            start += 1
            mass = _wide(words, WARP_LOWS + start, WARP_HIGHS + start)
        barrier()
        start *= part
        end = min(start + part, v)
    while end - start > VEC:
        var part = ceildiv(ceildiv(end - start, WARPS), VEC) * VEC
        var own_end = min(start + (warp_id() + 1) * part, end)
        var total = _warp_sum(mass_of(start + warp_id() * part + lane_id() * VEC, own_end, 32 * VEC))
        if lane_id() == 0:
            _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), total)
        barrier()
        if C == 1 and end - start == v:
            total = _warp_sum(_wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id()))
            rest = _multiply_high(random, total)  # uniform in 0..total-1
        var own = 0
        var mass = _wide(words, WARP_LOWS, WARP_HIGHS)
        while rest >= mass:
            rest -= mass
            own += 1
            mass = _wide(words, WARP_LOWS + own, WARP_HIGHS + own)
        start += own * part
        end = min(start + part, end)
        barrier()
    var e = kept(_load[ALIGN](x, start, end))
    var high = _mass_high(e)
    var mass = (high.cast[U64]() << 20) + _mass_low(e, high).cast[U64]()
    if C == 1 and v <= VEC:
        rest = _multiply_high(random, mass.reduce_add())
    comptime for lane in range(VEC - 1):
        if rest < mass[lane]:
            return start + lane
        rest -= mass[lane]
    return start + VEC - 1


def _choose[
    ALIGN: Int, C: Int
](words: Words, x: Ptr[F32], v: Int, floats: Ptr[F32], ints: Ptr[DType.int32], mut top_key: UInt32) -> Int:
    """The token that the row's parameters pick from the edited logits x; sets top_key to the largest key."""
    var token = 0
    top_key = _argmax[ALIGN, C](words, x, v, token)
    var temperature = floats[unsafe_offset=0]
    if not temperature > 0 or top_key == LOWEST_KEY:
        return token
    var inverse = _reciprocal(temperature)
    var min_p = floats[unsafe_offset=2]
    var random = _random(
        bitcast[U32, 1](ints[unsafe_offset=3]),
        bitcast[U32, 1](ints[unsafe_offset=4]),
        bitcast[U32, 1](ints[unsafe_offset=5]),
    )
    var top_p = floats[unsafe_offset=1]
    var top_k = Int(ints[unsafe_offset=0])
    if top_k < 0 or top_k >= v:
        top_k = 0  # no limit
    var top = _key_value(top_key)
    var lowest = UInt32(0)

    @always_inline
    def keep[column: Int](goal: UInt64, mut lowest: UInt32) {imm} -> Int:
        """Sets the lowest key that is kept; the token, if it could be drawn at once, or else -1."""
        var place = _locate[ALIGN, C, column](words, x, v, top, inverse, goal)
        if is_few(place):
            var few = _collect[ALIGN, C](words, x, v, top_key, inverse, place.bin)
            return few.draw(v, few.filter[column](top_p, goal), min_p, random)
        lowest = _filter[ALIGN, C, column](words, x, v, top_key, inverse, top_p, goal, place)
        return -1

    if top_k > 0 or top_p < 1:
        _histogram[ALIGN, C](words, FIRST, x, v, top, inverse, 0, NEAR_BINS)
        if top_k > 0:
            token = keep[COUNT](UInt64(top_k), lowest)
        else:
            var masses = _wide(words, FIRST + BINS + thread_idx.x, FIRST + 2 * BINS + thread_idx.x)
            token = keep[MASS](_top_p_goal(_block_sum(words, masses), top_p), lowest)
        if token >= 0:
            return token
    return _draw[ALIGN, C](words, x, v, top, inverse, lowest, min_p, random)
