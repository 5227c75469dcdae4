"""The arithmetic of the sampler that CPU and GPU share, so that both take the same decision on the same logits.

Keys order logits as integers, masses are probabilities as integers: sums of integers do not depend on their order,
hence not on the number of threads. The one float function, `_exp`, is spelt out in fused multiply-adds for that reason.
"""

from std.bit import bit_width
from std.math import log

from ._prelude import *

comptime U32 = DType.uint32
comptime U64 = DType.uint64

# Histograms have this many bins; bin 0 holds the largest logits. A search begins with bins of 1/32 of a scaled logit,
# and with one bin, NEAR_BINS, for all tokens that are 8 or more below the likeliest: they are many and rarely matter.
comptime BINS = 1024
comptime BIN_BITS = 10
comptime NEAR_BINS = 256

# A mass is exp(y) in units of 2^-40, y <= 0: it fits two halves of 20 bits, and 2^24 of them fit a UInt64.
comptime MASS_BITS = 40
comptime HALF = Float32(1 << 20)
comptime LOWEST_Y = Float32(-80)  # its mass is 0, and exp stays in the normal range

comptime LOWEST_KEY = UInt32(0x007FFFFF)  # the key of -inf
comptime HIGHEST_KEY = UInt32(0xFF7FFFFF)  # the key of the largest finite float

comptime MAX_LOGPROBS = 20  # columns of top_ids; mili.sampling_params writes the same number
comptime NUM_FLOATS = 3  # columns of floats: temperature, top_p, min_p
comptime NUM_INTS = 7  # columns of ints: top_k, num_logprobs, target_id, seed_lo, seed_hi, position, mask


@always_inline
def _key[W: SIMDLength](x: SIMD[F32, W]) -> SIMD[U32, W]:
    """Integers in the order of the floats. NaN counts as -inf, +inf as the largest finite float, -0 as +0."""
    var bits = bitcast[U32, W](x)
    var key = bits ^ ((0 - (bits >> 31)) | 0x80000000)
    key = key.eq(0x7FFFFFFF).select(SIMD[U32, W](0x80000000), key)
    key = key.gt(0xFF800000).select(SIMD[U32, W](LOWEST_KEY), key)
    return max(min(key, HIGHEST_KEY), LOWEST_KEY)


@always_inline
def _key_value(key: UInt32) -> Float32:
    """The float of a key."""
    var bits = key ^ 0x80000000 if key >= 0x80000000 else ~key
    return bitcast[F32, 1](bits)


@always_inline
def _reciprocal(temperature: Float32) -> Float32:
    """1 / temperature, finite, and rounded alike whatever division the device has."""
    var r = 1 / max(temperature, Float32(1e-30))
    return r.fma((-r).fma(temperature, Float32(1)), r)


@always_inline
def _scaled[W: SIMDLength](x: SIMD[F32, W], top: Float32, inverse: Float32) -> SIMD[F32, W]:
    """(x - top) / temperature in [LOWEST_Y, 0]; NaN becomes LOWEST_Y, and +inf 0."""
    var y = (x - top) * inverse
    y = y.gt(LOWEST_Y).select(y, SIMD[F32, W](LOWEST_Y))
    return y.lt(0).select(y, SIMD[F32, W](0))


@always_inline
def _exp[W: SIMDLength](y: SIMD[F32, W]) -> SIMD[F32, W]:
    """exp(y) for y in [LOWEST_Y, 0], within 2 ulp: y = n ln 2 + r, then a polynomial in r (Cephes' expf)."""
    comptime V = SIMD[F32, W]
    comptime MAGIC = Float32(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
    var shifted = y.fma(V(1.4426950408889634), V(MAGIC))
    var n = shifted - MAGIC
    var r = n.fma(V(-0.693359375), y)
    r = n.fma(V(2.12194440e-4), r)
    var p = r.fma(V(1.9875691500e-4), V(1.3981999507e-3))
    p = r.fma(p, V(8.3334519073e-3))
    p = r.fma(p, V(4.1665795894e-2))
    p = r.fma(p, V(1.6666665459e-1))
    p = r.fma(p, V(5.0000001201e-1))
    var e = p.fma(r * r, r) + 1
    var exponent = bitcast[U32, W](shifted) - bitcast[U32, 1](MAGIC)
    return bitcast[F32, W](bitcast[U32, W](e) + (exponent << 23))


@always_inline
def _mass_high[W: SIMDLength](e: SIMD[F32, W]) -> SIMD[U32, W]:
    """The upper 20 bits (21 for e = 1) of the mass of e = exp(y), in units of 2^-20."""
    return (e * HALF).cast[DType.int32]().cast[U32]()


@always_inline
def _mass_low[W: SIMDLength](e: SIMD[F32, W], high: SIMD[U32, W]) -> SIMD[U32, W]:
    """The lower 20 bits of the mass, in units of 2^-40; exact, for e has 24 bits."""
    var rest = e * HALF - high.cast[DType.int32]().cast[F32]()
    return (rest * HALF).cast[DType.int32]().cast[U32]()


@always_inline
def _join(high: UInt64, low: UInt64) -> UInt64:
    """The mass of two sums of halves."""
    return (high << 20) + low


@always_inline
def _bin[W: SIMDLength](y: SIMD[F32, W]) -> SIMD[DType.int32, W]:
    """The bin of a scaled logit; the last one has no end."""
    return min((y * -32).cast[DType.int32](), BINS - 1)


def _bin_low_key(bin: Int, top_key: UInt32, inverse: Float32) -> UInt32:
    """The lowest key in bins 0..bin: bisection, as `_bin` of `_scaled` never grows with the key."""
    var top = _key_value(top_key)
    var low = LOWEST_KEY
    var high = top_key
    while low < high:
        var middle = low + (high - low) // 2
        if Int(_bin[1](_scaled[1](_key_value(middle), top, inverse))) <= bin:
            high = middle
        else:
            low = middle + 1
    return low


@always_inline
def _digit_shift(span: UInt32) -> UInt32:
    """Bits to drop so that keys 0..span fit the bins."""
    return UInt32(max(Int(bit_width(span)) - BIN_BITS, 0))


@always_inline
def _multiply_high(a: UInt64, b: UInt64) -> UInt64:
    """The upper 64 bits of a * b."""
    var a_low = a & 0xFFFFFFFF
    var a_high = a >> 32
    var b_low = b & 0xFFFFFFFF
    var b_high = b >> 32
    var middle = a_high * b_low + ((a_low * b_low) >> 32)
    var carry = a_low * b_high + (middle & 0xFFFFFFFF)
    return a_high * b_high + (middle >> 32) + (carry >> 32)


@always_inline
def _top_p_goal(total: UInt64, top_p: Float32) -> UInt64:
    """The mass that the most likely tokens must reach: top_p < 1 of the total, and never nothing."""
    var fraction = (max(top_p, Float32(0)) * Float32(4294967296.0)).cast[U64]() << 32
    return max(_multiply_high(total, fraction), 1)


@always_inline
def _random(seed_low: UInt32, seed_high: UInt32, position: UInt32) -> UInt64:
    """64 random bits: two words of Philox4x32-10 with key (seed_low, seed_high) and counter (position, 0, 0, 0)."""
    var c0 = UInt64(position)
    var c1 = UInt64(0)
    var c2 = UInt64(0)
    var c3 = UInt64(0)
    var k0 = seed_low
    var k1 = seed_high
    comptime for _ in range(10):
        var p0 = c0 * 0xD2511F53
        var p1 = c2 * 0xCD9E8D57
        c0 = (p1 >> 32) ^ c1 ^ UInt64(k0)
        c1 = p1 & 0xFFFFFFFF
        c2 = (p0 >> 32) ^ c3 ^ UInt64(k1)
        c3 = p0 & 0xFFFFFFFF
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0 | (c1 << 32)


@always_inline
def _edited(logit: Float32, values: Ptr[F32], edit: Int) -> Float32:
    """The logit after bias (or ban), repetition penalty and subtraction."""
    var x = logit + values[unsafe_offset=edit * 3]
    var repetition = values[unsafe_offset=edit * 3 + 1]
    var subtract = values[unsafe_offset=edit * 3 + 2]
    return x / repetition - subtract if x > 0 else x.fma(repetition, -subtract)


@always_inline
def _mask_word(mask: Ptr[DType.int32], num_words: Int, at: Int) -> UInt32:
    """Which of the tokens 32 at .. 32 at + 31 may be drawn; none past the last word."""
    return bitcast[U32, 1](mask[unsafe_offset=at]) if at < num_words else 0


@always_inline
def _allowed(mask: Ptr[DType.int32], num_words: Int, token_id: Int) -> Bool:
    """Whether the mask has the token's bit."""
    return (_mask_word(mask, num_words, token_id >> 5) >> UInt32(token_id & 31)) & 1 != 0


@always_inline
def _log_total(total: UInt64) -> Float32:
    """The logarithm of a sum of masses, in units of one."""
    return log(total.cast[F32]() * Float32(9.094947017729282e-13))


@always_inline
def _logprob(key: UInt32, top: Float32, log_total: Float32) -> Float32:
    """The log-probability of a key; -inf for -inf, also where the whole row is."""
    return _key_value(LOWEST_KEY) if key == LOWEST_KEY else _key_value(key) - top - log_total
