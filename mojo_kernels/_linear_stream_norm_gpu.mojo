"""What a block of `_linear_stream_kernel_gpu` does before it multiplies: x + residual and its RMSNorm, into shared memory.

Every block does it for all rows; block 0 writes the new residual. The rounding is that of `add_rms_norm`, and the sum of
squares runs in an order of its own: threads, warps, then the 8 warps in order.
"""

from ._prelude import *
from max.gpu.sync import named_barrier

comptime BLOCK = 256
comptime STEP = BLOCK * 8
comptime KEPT = 4  # vectors of a row that a thread holds: rows up to 8192
comptime UNROLL = 4  # vectors a thread fetches at once when there are several rows
comptime MAX_TOKENS = 4


@always_inline
def prefetch_gain(gain: Ptr[BF16], k: Int) -> Array[SIMD[BF16, 8], KEPT]:
    """The thread's part of the gain, a weight: fetched before the kernel ahead has finished."""
    var v = Array[SIMD[BF16, 8], KEPT](fill=0)
    comptime for j in range(KEPT):
        var at = thread_idx.x * 8 + j * STEP
        if at < k:
            v[j] = gain.unsafe_load[width=8, alignment=16](at)
    return v^


@always_inline
def _scale(partial: MutPointer[Float32, _, address_space=AddressSpace.SHARED], k: Int, eps: Float32) -> Float32:
    var total = Float32(0)
    comptime for j in range(BLOCK // WARP_SIZE):
        total += partial[unsafe_offset=j]
    return 1 / sqrt(total / Float32(k) + eps)


@always_inline
def norm_one(
    normed: MutPointer[Scalar[BF16], _, address_space=AddressSpace.SHARED],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gains: Array[SIMD[BF16, 8], KEPT],
    partial: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    k: Int,
    eps: Float32,
):
    """One row, which stays in registers between the sum and the scaling."""
    var kept = Array[SIMD[BF16, 8], KEPT](fill=0)
    var total = Float32(0)
    comptime for j in range(KEPT):
        var at = thread_idx.x * 8 + j * STEP
        if at < k:
            var r = (
                x.unsafe_load[width=8, alignment=16](at).cast[F32]()
                + residual.unsafe_load[width=8, alignment=16](at).cast[F32]()
            ).cast[BF16]()
            kept[j] = r
            total += (r.cast[F32]() * r.cast[F32]()).reduce_add()
            if block_idx.x == 0:
                residual_out.unsafe_store[alignment=16](at, r)
    total = warp.sum(total)
    if lane_id() == 0:
        partial[unsafe_offset=warp_id()] = total
    named_barrier[Int32(BLOCK)](1)
    var scale = _scale(partial, k, eps)
    comptime for j in range(KEPT):
        var at = thread_idx.x * 8 + j * STEP
        if at < k:
            var v = kept[j].cast[F32]() * scale * gains[j].cast[F32]()
            normed.unsafe_store[alignment=16](at, v.cast[BF16]())
    named_barrier[Int32(BLOCK)](1)


@always_inline
def norm_several(
    normed: MutPointer[Scalar[BF16], _, address_space=AddressSpace.SHARED],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    partial: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    m: Int,
    k: Int,
    pitch: Int,
    eps: Float32,
):
    """Several rows: sums x + residual in shared memory."""
    var vectors = m * k // 8
    for start in range(thread_idx.x, vectors, BLOCK * UNROLL):
        var a = Array[SIMD[BF16, 8], UNROLL](fill=0)
        var b = Array[SIMD[BF16, 8], UNROLL](fill=0)
        comptime for u in range(UNROLL):
            var at = start + u * BLOCK
            if at < vectors:
                a[u] = x.unsafe_load[width=8, alignment=16](at * 8)
                b[u] = residual.unsafe_load[width=8, alignment=16](at * 8)
        comptime for u in range(UNROLL):
            var at = (start + u * BLOCK) * 8
            if at < vectors * 8:
                var r = (a[u].cast[F32]() + b[u].cast[F32]()).cast[BF16]()
                var token = Int(UInt32(at) // UInt32(k))
                normed.unsafe_store[alignment=16](at + token * (pitch - k), r)
                if block_idx.x == 0:
                    residual_out.unsafe_store[alignment=16](at, r)
    named_barrier[Int32(BLOCK)](1)
    var totals = SIMD[F32, MAX_TOKENS](0)
    for at in range(thread_idx.x * 8, k, STEP):
        comptime for t in range(MAX_TOKENS):  # past the last row: that row again, for nothing
            var r = normed.unsafe_load[width=8, alignment=16](min(t, m - 1) * pitch + at).cast[F32]()
            totals[t] += (r * r).reduce_add()
    comptime for t in range(MAX_TOKENS):
        var total = warp.sum(totals[t])
        if lane_id() == 0 and t < m:
            partial[unsafe_offset=t * (BLOCK // WARP_SIZE) + warp_id()] = total
    named_barrier[Int32(BLOCK)](1)
    var scales = partial.unsafe_offset(MAX_TOKENS * (BLOCK // WARP_SIZE))
    if thread_idx.x < m:
        scales[unsafe_offset=thread_idx.x] = _scale(
            partial.unsafe_offset(thread_idx.x * (BLOCK // WARP_SIZE)), k, eps
        )
    named_barrier[Int32(BLOCK)](1)
    for i in range(thread_idx.x, vectors, BLOCK):
        var token = Int(UInt32(i * 8) // UInt32(k))
        var at = i * 8 + token * (pitch - k)
        var r = normed.unsafe_load[width=8, alignment=16](at).cast[F32]()
        var g = gain.unsafe_load[width=8, alignment=16](i * 8 - token * k).cast[F32]()
        normed.unsafe_store[alignment=16](at, (r * scales[unsafe_offset=token] * g).cast[BF16]())
    named_barrier[Int32(BLOCK)](1)


@always_inline
def copy_rows(
    held: MutPointer[Scalar[BF16], _, address_space=AddressSpace.SHARED], x: Ptr[BF16], m: Int, k: Int, pitch: Int
):
    """Copies x [m, k] as it is."""
    var vectors = m * k // 8
    for start in range(thread_idx.x, vectors, BLOCK * UNROLL):
        var v = Array[SIMD[BF16, 8], UNROLL](fill=0)
        comptime for u in range(UNROLL):
            var at = start + u * BLOCK
            if at < vectors:
                v[u] = x.unsafe_load[width=8, alignment=16](at * 8)
        comptime for u in range(UNROLL):
            var at = (start + u * BLOCK) * 8
            if at < vectors * 8:
                held.unsafe_store[alignment=16](at + Int(UInt32(at) // UInt32(k)) * (pitch - k), v[u])
    named_barrier[Int32(BLOCK)](1)
