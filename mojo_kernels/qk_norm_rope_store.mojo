"""Between the QKV projection and attention: per-head RMSNorm of q and k, RoPE, and the write of k and v to the cache.

Math:      n(x) = x / sqrt(mean(x^2) + eps) * weight, per head;
           rope(x)[i] = x[i] cos_i - x[i + D/2] sin_i,  rope(x)[i + D/2] = x[i + D/2] cos_i + x[i] sin_i,  i < D/2;
           q = rope(n(q)), k = rope(n(k)), v unchanged
Shapes:    q [T, Hq*D] = qkv [T, (Hq+2 Hkv)*D], q_norm [D], k_norm [D], cos_sin [M, D] float32 (cos half, then sin half),
           positions [T] int32 < M, slots [T] int32 (page * S + offset),
           k_cache CPU [L, P, Hkv, D, S], GPU [L, P, Hkv, S, D]; v_cache [L, P, Hkv, S, D]; layer scalar
Dtypes:    bfloat16 or float32, cache alike; float32 arithmetic, one rounding at the store
CPU:       parallel over tokens; SIMD over half a head
GPU:       D/16 lanes per head, each with 8 neighbouring pairs (i, i + D/2) in 16-byte vectors; a thread block of 128 threads has
           16 heads (D 128) or 32 of one token
Bound:     bytes = T (2 Hq + 4 Hkv) D sizeof(dtype) + T D 4; flops = 8 T (Hq + Hkv) D
Limits:    D is 64 or 128. Keys of one page lie side by side on the CPU, so that attention
           reads a vector of keys per dimension
Source:    RoPE: Su 2021 (arXiv 2104.09864) in the half-rotation layout of the checkpoints; q/k norm: Qwen3 report
"""

from ._parallel import for_each
from ._prelude import *
from std.bit import log2_floor

comptime _THREADS = 128  # of a GPU thread block
comptime _PAIRS = 8  # (i, i + D/2) that a lane holds


@always_inline
def _norm_rope_head_cpu[
    dtype: DType, D: Int
](x: Ptr[dtype], weight: Ptr[dtype], cos_sin: Ptr[F32], eps: Float32) -> SIMD[F32, D]:
    var h = x.unsafe_load[width=D](0).cast[F32]()
    var scale = 1 / sqrt((h * h).reduce_add() / Float32(D) + eps)
    h = h * scale * weight.unsafe_load[width=D](0).cast[F32]()
    comptime HALF = D // 2
    var low = h.slice[HALF, offset=0]()
    var high = h.slice[HALF, offset=HALF]()
    var c = cos_sin.unsafe_load[width=HALF](0)
    var s = cos_sin.unsafe_load[width=HALF](HALF)
    return rebind[SIMD[F32, D]]((low * c - high * s).join(high * c + low * s))


def _qk_norm_rope_store_cpu[
    dtype: DType, D: Int
](
    q: Ptr[dtype],
    qkv: Ptr[dtype],
    q_norm: Ptr[dtype],
    k_norm: Ptr[dtype],
    cos_sin: Ptr[F32],
    positions: Ptr[DType.int32],
    slots: Ptr[DType.int32],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    tokens: Int,
    num_q_heads: Int,
    num_kv_heads: Int,
    page_size: Int,
    eps: Float32,
):
    def token(t: Int) {var}:
        var row = qkv.unsafe_offset(t * (num_q_heads + 2 * num_kv_heads) * D)
        var angles = cos_sin.unsafe_offset(Int(positions[unsafe_offset=t]) * D)
        for head in range(num_q_heads):
            var rotated = _norm_rope_head_cpu[dtype, D](row.unsafe_offset(head * D), q_norm, angles, eps)
            q.unsafe_store((t * num_q_heads + head) * D, rotated.cast[dtype]())
        var page = Int(slots[unsafe_offset=t]) // page_size
        var offset = Int(slots[unsafe_offset=t]) % page_size
        for head in range(num_kv_heads):
            var k = row.unsafe_offset((num_q_heads + head) * D)
            var v = row.unsafe_offset((num_q_heads + num_kv_heads + head) * D)
            var rotated = _norm_rope_head_cpu[dtype, D](k, k_norm, angles, eps).cast[dtype]()
            var at = (page * num_kv_heads + head) * page_size * D
            comptime for d in range(D):
                k_layer[unsafe_offset=at + d * page_size + offset] = rotated[d]
            v_layer.unsafe_store(at + offset * D, v.unsafe_load[width=D](0))

    for_each(token, tokens, 4 * tokens * (num_q_heads + 2 * num_kv_heads) * D * size_of[dtype]())


@always_inline
def _vector[dtype: DType](x: Ptr[dtype], i: Int) -> SIMD[F32, _PAIRS]:
    return x.unsafe_load[width=_PAIRS, alignment=16](i).cast[F32]()


def _qk_norm_rope_store_kernel[
    dtype: DType, D: Int
](
    q: Ptr[dtype],
    qkv: Ptr[dtype],
    q_norm: Ptr[dtype],
    k_norm: Ptr[dtype],
    cos_sin: Ptr[F32],
    positions: Ptr[DType.int32],
    slots: Ptr[DType.int32],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    num_q_heads32: Int32,
    num_kv_heads32: Int32,
    page_size32: Int32,
    eps: Float32,
):
    comptime HALF = D // 2
    comptime LANES = HALF // _PAIRS  # of a head
    var num_q_heads = Int(num_q_heads32)
    var num_kv_heads = Int(num_kv_heads32)
    var page_size = Int(page_size32)
    var t = block_idx.x
    var heads = num_q_heads + 2 * num_kv_heads
    var own = (block_idx.y * _THREADS + thread_idx.x) // LANES
    var head = min(own, heads - 1)  # lanes past the last head repeat it, for the sums of a warp, and store nothing
    var at = thread_idx.x % LANES * _PAIRS

    # All that the kernel ahead does not write is fetched before it has finished.
    launch_dependent_grids()
    var weight = q_norm if head < num_q_heads else k_norm
    var weight_low = _vector[dtype](weight, at)
    var weight_high = _vector[dtype](weight, at + HALF)
    var slot = Int(slots[unsafe_offset=t])
    var angles = Int(positions[unsafe_offset=t]) * D + at
    var c = _vector[F32](cos_sin, angles)
    var s = _vector[F32](cos_sin, angles + HALF)
    wait_on_dependent_grids()

    var low = _vector[dtype](qkv, (t * heads + head) * D + at)
    var high = _vector[dtype](qkv, (t * heads + head) * D + at + HALF)
    var squares = (low * low + high * high).reduce_add()
    comptime for step in range(log2_floor(LANES)):
        squares += warp.shuffle_xor(squares, UInt32(1 << step))
    if own >= heads:
        return
    var out = q.unsafe_offset((t * num_q_heads + head) * D + at)
    if head >= num_q_heads:
        var is_k = head < num_q_heads + num_kv_heads
        var kv_head = head - num_q_heads - (0 if is_k else num_kv_heads)
        var page = (slot // page_size) * num_kv_heads + kv_head
        out = (k_layer if is_k else v_layer).unsafe_offset((page * page_size + slot % page_size) * D + at)
    if head < num_q_heads + num_kv_heads:
        var scale = 1 / sqrt(squares / Float32(D) + eps)
        var x = low * scale * weight_low
        var z = high * scale * weight_high
        low = x * c - z * s
        high = z * c + x * s
    out.unsafe_store[alignment=16](0, low.cast[dtype]())
    out.unsafe_store[alignment=16](HALF, high.cast[dtype]())


@extensibility.register("mili.qk_norm_rope_store")
struct QkNormRopeStore:
    """Normalises and rotates q and k, writes k and v to their cache slots, returns q."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32
    ](
        q: OutputTensor[rank=2, ...],
        qkv: InputTensor[dtype=q.dtype, rank=2, ...],
        q_norm: InputTensor[dtype=q.dtype, rank=1, ...],
        k_norm: InputTensor[dtype=q.dtype, rank=1, ...],
        cos_sin: InputTensor[dtype=F32, rank=2, ...],
        positions: InputTensor[dtype=DType.int32, rank=1, ...],
        slots: InputTensor[dtype=DType.int32, rank=1, ...],
        k_cache: MutableInputTensor[dtype=q.dtype, rank=5, ...],
        v_cache: MutableInputTensor[dtype=q.dtype, rank=5, ...],
        layer: Int32,
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square of a head.

        Args:
            q: Rotated queries [T, Hq*D].
            qkv: Projections [T, (Hq+2 Hkv)*D].
            q_norm: Query gain [D].
            k_norm: Key gain [D].
            cos_sin: Angles by position [M, D].
            positions: Position of each token [T].
            slots: Cache slot of each token [T].
            k_cache: Key cache, written.
            v_cache: Value cache, written.
            layer: Which layer of the caches.
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var tokens = q.dim_size(0)
        if tokens == 0:
            return
        comptime D = Int(q_norm._static_shape_tuple[0])
        comptime assert D == 64 or D == 128, "mili.qk_norm_rope_store: head_dim must be 64 or 128"
        var num_kv_heads = v_cache.dim_size(2)
        var num_q_heads = q.dim_size(1) // D
        var page_size = v_cache.dim_size(3)
        var layer_size = v_cache.dim_size(1) * num_kv_heads * page_size * D
        var k_layer = k_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        var v_layer = v_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        comptime if is_cpu[target]():
            _qk_norm_rope_store_cpu[q.dtype, D](
                q.unsafe_ptr(),
                qkv.unsafe_ptr(),
                q_norm.unsafe_ptr(),
                k_norm.unsafe_ptr(),
                cos_sin.unsafe_ptr(),
                positions.unsafe_ptr(),
                slots.unsafe_ptr(),
                k_layer,
                v_layer,
                tokens,
                num_q_heads,
                num_kv_heads,
                page_size,
                eps,
            )
        elif is_gpu[target]():
            comptime kernel = _qk_norm_rope_store_kernel[q.dtype, D]
            ctx.enqueue_function[kernel](
                q.unsafe_ptr(),
                qkv.unsafe_ptr(),
                q_norm.unsafe_ptr(),
                k_norm.unsafe_ptr(),
                cos_sin.unsafe_ptr(),
                positions.unsafe_ptr(),
                slots.unsafe_ptr(),
                k_layer,
                v_layer,
                Int32(num_q_heads),
                Int32(num_kv_heads),
                Int32(page_size),
                eps,
                grid_dim=(tokens, ceildiv(num_q_heads + 2 * num_kv_heads, _THREADS * 16 // D)),
                block_dim=_THREADS,
                attributes=pdl_launch_attributes(PDLLevel.ON),
            )
        else:
            comptime assert False, "mili.qk_norm_rope_store: unsupported target"
