"""RMSNorm and RoPE of one head by a few lanes of a GPU warp: shared, so that every kernel rounds alike.

Lane i of a head of D elements holds its pairs (8 i + j, 8 i + j + D/2), j < 8, in two vectors; D/16 lanes make a head.
"""

from ._prelude import *
from std.bit import log2_floor

comptime PAIRS = 8  # (i, i + D/2) that a lane holds


@always_inline
def load_pairs[dtype: DType](x: Ptr[dtype], i: Int) -> SIMD[F32, PAIRS]:
    """One 16-byte vector of bfloat16, or two of float32, as float32."""
    return x.unsafe_load[width=PAIRS, alignment=16](i).cast[F32]()


@always_inline
def norm_rope[
    D: Int
](
    mut low: SIMD[F32, PAIRS],
    mut high: SIMD[F32, PAIRS],
    weight_low: SIMD[F32, PAIRS],
    weight_high: SIMD[F32, PAIRS],
    c: SIMD[F32, PAIRS],
    s: SIMD[F32, PAIRS],
    eps: Float32,
):
    """Normalises and rotates in place; every lane of the warp must call it. Each fma is spelled out: no compiler chooses."""
    var squares = low.fma(low, high * high).reduce_add()
    comptime for step in range(log2_floor(D // 2 // PAIRS)):
        squares += warp.shuffle_xor(squares, UInt32(1 << step))
    var scale = 1 / sqrt(squares / Float32(D) + eps)
    var x = low * scale * weight_low
    var z = high * scale * weight_high
    low = x.fma(c, -(z * s))
    high = z.fma(c, x * s)
