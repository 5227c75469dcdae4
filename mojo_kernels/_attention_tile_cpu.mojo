"""Register tiles of the CPU's attention: scores, softmax and weighted sum of one tile of keys.

Lanes run over keys in q k^T (a page keeps its keys side by side) and over the head dimension in p v. Every function treats each
query row on its own: a row's arithmetic is the same in a tile of one row and in a tile of four.
"""

from ._prelude import *

comptime W = min(simd_width_of[F32](), 16)
comptime TILE = 64  # keys per softmax step
comptime LOWEST = Float32.MIN_FINITE
comptime ROWS_QK = 4  # query rows per register tile of q k^T
comptime ROWS_PV = 2  # and of p v


@always_inline
def _load_keys[dtype: DType, D: Int, PW: Int](
    keys: Ptr[F32], k_layer: Ptr[dtype], pages: Ptr[DType.int32], head: Int, num_kv_heads: Int, page_size: Int, first: Int, end: Int
):
    """Widens keys [first, end) of one head to keys[d][0..TILE); PW keys (at most a page) move at a time."""
    var at = first
    while at < end:
        var page = Int(pages[unsafe_offset=at // page_size])
        var source = k_layer.unsafe_offset((page * num_kv_heads + head) * page_size * D + at % page_size)
        for d in range(D):
            keys.unsafe_store(d * TILE + at - first, source.unsafe_load[width=PW](d * page_size).cast[F32]())
        at += PW


@always_inline
def _scores[D: Int, ROWS: Int](scores: Ptr[F32], q: Ptr[F32], keys: Ptr[F32]):
    """Computes scores[r][j] = sum_d q[r][d] keys[d][j] for a whole tile of keys."""
    comptime VECS = TILE // W
    comptime HALF = 2 if W < 16 else 1  # narrow vectors: fewer accumulators at a time
    comptime N = VECS // HALF
    comptime for part in range(HALF):
        var acc = Array[SIMD[F32, W], ROWS * N](fill=0)
        for d in range(D):
            comptime for v in range(N):
                var key = keys.unsafe_load[width=W](d * TILE + (part * N + v) * W)
                comptime for r in range(ROWS):
                    acc[r * N + v] = key.fma(SIMD[F32, W](q[unsafe_offset=r * D + d]), acc[r * N + v])
        comptime for r in range(ROWS):
            comptime for v in range(N):
                scores.unsafe_store(r * TILE + (part * N + v) * W, acc[r * N + v])


# --8<-- [start:softmax_row]
@always_inline
def _softmax_row(scores: Ptr[F32], valid: Int, mut m: Float32, mut l: Float32) -> Float32:
    """Turns one row of scores into weights in place, masked past `valid`; returns the factor for what came before."""
    var lanes = SIMD[F32, W](0)
    comptime for i in range(W):
        lanes[i] = Float32(i)
    var top = SIMD[F32, W](LOWEST)
    comptime for v in range(TILE // W):
        var s = scores.unsafe_load[width=W](v * W)
        s = (lanes + Float32(v * W)).lt(Float32(valid)).select(s, SIMD[F32, W](LOWEST))
        scores.unsafe_store(v * W, s)
        top = max(top, s)
    var new_m = max(m, top.reduce_max())
    var total = SIMD[F32, W](0)
    comptime for v in range(TILE // W):
        var p = exp(scores.unsafe_load[width=W](v * W) - new_m)
        p = (lanes + Float32(v * W)).lt(Float32(valid)).select(p, SIMD[F32, W](0))
        scores.unsafe_store(v * W, p)
        total += p
    var factor = exp(m - new_m)
    l = l * factor + total.reduce_add()
    m = new_m
    return factor
    # --8<-- [end:softmax_row]


@always_inline
def _accumulate[dtype: DType, D: Int, ROWS: Int](
    o: Ptr[F32],
    weights: Ptr[F32],
    factors: Ptr[F32],
    v_layer: Ptr[dtype],
    pages: Ptr[DType.int32],
    head: Int,
    num_kv_heads: Int,
    page_size: Int,
    first: Int,
    end: Int,
):
    """Computes o[r] = o[r] * factors[r] + sum_j weights[r][j] v[first + j]; keys from `end` on are never read."""
    comptime VECS = D // W
    comptime PARTS = 1 if W >= 16 else 2
    comptime N = VECS // PARTS
    comptime for part in range(PARTS):
        var acc = Array[SIMD[F32, W], ROWS * N](fill=0)
        comptime for r in range(ROWS):
            comptime for v in range(N):
                acc[r * N + v] = o.unsafe_load[width=W](r * D + (part * N + v) * W) * factors[unsafe_offset=r]
        var at = first
        while at < end:
            var page = Int(pages[unsafe_offset=at // page_size])
            var offset = at % page_size
            var stop = min(page_size, offset + end - at)
            var rows = v_layer.unsafe_offset((page * num_kv_heads + head) * page_size * D + part * N * W)
            for j in range(offset, stop):
                comptime for v in range(N):
                    var value = rows.unsafe_load[width=W](j * D + v * W).cast[F32]()
                    comptime for r in range(ROWS):
                        var p = SIMD[F32, W](weights[unsafe_offset=r * TILE + at - first + j - offset])
                        acc[r * N + v] = value.fma(p, acc[r * N + v])
            at += stop - offset
        comptime for r in range(ROWS):
            comptime for v in range(N):
                o.unsafe_store(r * D + (part * N + v) * W, acc[r * N + v])


# --8<-- [start:merge_row]
@always_inline
def _merge_row[D: Int](
    mut m: Float32, mut l: Float32, o: Ptr[F32], part_m: Float32, part_l: Float32, part_o: Ptr[F32]
):
    """Folds the result of a later chunk of keys into the result of the earlier ones."""
    var new_m = max(m, part_m)
    var a = exp(m - new_m)
    var b = exp(part_m - new_m)
    comptime for v in range(D // W):
        o.unsafe_store(v * W, o.unsafe_load[width=W](v * W) * a + part_o.unsafe_load[width=W](v * W) * b)
    m = new_m
    l = l * a + part_l * b
    # --8<-- [end:merge_row]
