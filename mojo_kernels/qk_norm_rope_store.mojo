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
           16 heads (D 128) or 32, and from 24576 heads on, where bytes in flight count more than lanes, two heads per lane
Bound:     bytes = T (2 Hq + 4 Hkv) D sizeof(dtype) + T D 4; flops = 8 T (Hq + Hkv) D
Limits:    D is 64 or 128. Keys of one page lie side by side on the CPU, so that attention
           reads a vector of keys per dimension
Source:    RoPE: Su 2021 (arXiv 2104.09864) in the half-rotation layout of the checkpoints; q/k norm: Qwen3 report
"""

from ._norm_rope_gpu import PAIRS, load_pairs, norm_rope
from ._parallel import for_each
from ._prelude import *

comptime _THREADS = 128  # of a GPU thread block
comptime _MANY = 24576  # heads of all tokens from which a lane has two: enough loads in flight then matter more than lanes


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


def _qk_norm_rope_store_kernel[
    dtype: DType, D: Int, HEADS: Int
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
    tokens32: Int32,
    num_q_heads32: Int32,
    num_kv_heads32: Int32,
    page_size32: Int32,
    eps: Float32,
):
    comptime HALF = D // 2
    comptime LANES = HALF // PAIRS  # of a head
    var num_q_heads = Int(num_q_heads32)
    var num_kv_heads = Int(num_kv_heads32)
    var page_size = Int(page_size32)
    var heads = num_q_heads + 2 * num_kv_heads
    var parts = UInt32(heads // HEADS)
    var own = UInt32(block_idx.x * (_THREADS // LANES) + thread_idx.x // LANES)
    var part = min(own, UInt32(tokens32) * parts - 1)  # lanes past the last repeat it, for the sums of a warp, and store nothing
    var t = Int(part // parts)
    var head = Int(part % parts) * HEADS
    var at = thread_idx.x % LANES * PAIRS

    # All that the kernel ahead does not write is fetched before it has finished, and where to store is known by then.
    launch_dependent_grids()
    var slot = UInt32(slots[unsafe_offset=t])
    var angles = cos_sin.unsafe_offset(Int(positions[unsafe_offset=t]) * D + at)
    var weight = q_norm if head < num_q_heads else k_norm
    var weight_low = load_pairs[dtype](weight, at)
    var weight_high = load_pairs[dtype](weight, at + HALF)
    var c = SIMD[F32, PAIRS](0)
    var s = SIMD[F32, PAIRS](0)
    comptime if HEADS == 1:
        c = load_pairs[F32](angles, 0)
        s = load_pairs[F32](angles, HALF)
    var out = q.unsafe_offset((t * num_q_heads + head) * D + at)
    var out_head = D  # from one head to the next
    if head >= num_q_heads:
        var is_k = head < num_q_heads + num_kv_heads
        var kv_head = head - num_q_heads - (0 if is_k else num_kv_heads)
        var page = Int(slot // UInt32(page_size32)) * num_kv_heads + kv_head
        var offset = Int(slot % UInt32(page_size32))
        out = (k_layer if is_k else v_layer).unsafe_offset((page * page_size + offset) * D + at)
        out_head = page_size * D
    wait_on_dependent_grids()

    var row = qkv.unsafe_offset((t * heads + head) * D + at)
    var lows = Array[SIMD[dtype, PAIRS], HEADS](fill=0)
    var highs = Array[SIMD[dtype, PAIRS], HEADS](fill=0)
    comptime for i in range(HEADS):
        lows[i] = row.unsafe_load[width=PAIRS, alignment=16](i * D)
        highs[i] = row.unsafe_load[width=PAIRS, alignment=16](i * D + HALF)
    comptime if HEADS > 1:  # many tokens: nobody waited above, and a position still on its way must not hold back the row
        c = load_pairs[F32](angles, 0)
        s = load_pairs[F32](angles, HALF)
    comptime for i in range(HEADS):
        var low = lows[i].cast[F32]()
        var high = highs[i].cast[F32]()
        norm_rope[D](low, high, weight_low, weight_high, c, s, eps)
        if head < num_q_heads + num_kv_heads:
            lows[i] = low.cast[dtype]()
            highs[i] = high.cast[dtype]()
        if own == part:
            out.unsafe_store[alignment=16](i * out_head, lows[i])
            out.unsafe_store[alignment=16](i * out_head + HALF, highs[i])


def _qk_norm_rope_store_gpu[
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
    ctx: DeviceContext,
) raises:
    var heads = num_q_heads + 2 * num_kv_heads

    @always_inline
    def launch[HEADS: Int]() raises {imm}:
        comptime kernel = _qk_norm_rope_store_kernel[dtype, D, HEADS]
        ctx.enqueue_function[kernel](
            q,
            qkv,
            q_norm,
            k_norm,
            cos_sin,
            positions,
            slots,
            k_layer,
            v_layer,
            Int32(tokens),
            Int32(num_q_heads),
            Int32(num_kv_heads),
            Int32(page_size),
            eps,
            grid_dim=ceildiv(tokens * heads // HEADS, _THREADS * 16 // D),
            block_dim=_THREADS,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if tokens * heads >= _MANY and num_q_heads % 2 == 0 and num_kv_heads % 2 == 0:
        launch[2]()
    else:
        launch[1]()


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
            _qk_norm_rope_store_gpu[q.dtype, D](
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
                ctx,
            )
        else:
            comptime assert False, "mili.qk_norm_rope_store: unsupported target"
