"""From the QKV projection to attended rows: `mili.qk_norm_rope_store`, then `mili.paged_attention`, in one kernel where that pays.

Math:      that of the two ops, with their roundings: q and the cached k are rounded before they meet
Shapes:    out, q [T, Hq*D] = qkv [T, (Hq+2 Hkv)*D] and the inputs of both ops; q is scratch: filled or not, nobody reads it
Dtypes:    bfloat16 or float32, cache alike; float32 arithmetic
CPU:       the two ops, one after the other
GPU:       bfloat16 with one token for each request: `_paged_attention_gpu_decode`, fused: no launch and no trip through memory
           between norm and attention, and older keys arrive while the projection runs. Else, and with batch_invariant always, the
           kernels of the two ops
Bound:     bytes = sizeof(dtype) (T (2 Hq + 4 Hkv) D + 2 Hkv D sum_b seq_lens[b]); flops = those of the two ops
Limits:    those of the two ops
Source:    those of the two ops
"""

from ._paged_attention_cpu import paged_attention_cpu
from ._paged_attention_gpu import paged_attention_gpu
from ._paged_attention_gpu_decode import launch_decode
from ._prelude import *
from .qk_norm_rope_store import _qk_norm_rope_store_cpu, _qk_norm_rope_store_gpu


@extensibility.register("mili.rope_attention")
struct RopeAttention:
    """Normalises and rotates q and k, writes k and v to their cache slots, attends each row up to its own position."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32, scale: Float32, batch_invariant: Bool
    ](
        output: OutputTensor[rank=2, ...],
        q: OutputTensor[dtype=output.dtype, rank=2, ...],
        qkv: InputTensor[dtype=output.dtype, rank=2, ...],
        q_norm: InputTensor[dtype=output.dtype, rank=1, ...],
        k_norm: InputTensor[dtype=output.dtype, rank=1, ...],
        cos_sin: InputTensor[dtype=F32, rank=2, ...],
        positions: InputTensor[dtype=DType.int32, rank=1, ...],
        slots: InputTensor[dtype=DType.int32, rank=1, ...],
        k_cache: MutableInputTensor[dtype=output.dtype, rank=5, ...],
        v_cache: MutableInputTensor[dtype=output.dtype, rank=5, ...],
        page_table: InputTensor[dtype=DType.int32, rank=2, ...],
        query_starts: InputTensor[dtype=DType.int32, rank=1, ...],
        seq_lens: InputTensor[dtype=DType.int32, rank=1, ...],
        layer: Int32,
        max_query_len: Int32,
        max_seq_len: Int32,
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square of a head.
            scale: Factor on the scores, 1 / sqrt(D).
            batch_invariant: Whether a row's bits may not depend on how many rows its request has.

        Args:
            output: Attended rows [T, Hq*D].
            q: Scratch for the rotated queries [T, Hq*D].
            qkv: Projections [T, (Hq+2 Hkv)*D].
            q_norm: Query gain [D].
            k_norm: Key gain [D].
            cos_sin: Angles by position [M, D].
            positions: Position of each token [T].
            slots: Cache slot of each token [T].
            k_cache: Key cache, written at the slots and read.
            v_cache: Value cache, written at the slots and read.
            page_table: Page ids of each request [B, W].
            query_starts: First row of each request, and T [B+1].
            seq_lens: Cached tokens of each request, this step's included [B].
            layer: Which layer of the caches.
            max_query_len: Most rows of any request.
            max_seq_len: Most cached tokens of any request.
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var tokens = output.dim_size(0)
        var num_requests = seq_lens.dim_size(0)
        if tokens == 0:
            return
        comptime D = Int(q_norm._static_shape_tuple[0])
        comptime assert D == 64 or D == 128, "mili.rope_attention: head_dim must be 64 or 128"
        var num_q_heads = output.dim_size(1) // D
        var num_kv_heads = v_cache.dim_size(2)
        var page_size = v_cache.dim_size(3)
        var layer_size = v_cache.dim_size(1) * num_kv_heads * page_size * D
        var k_layer = k_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        var v_layer = v_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        comptime if is_gpu[target]() and output.dtype == BF16 and not batch_invariant:
            if max_query_len == 1 and tokens == num_requests:
                comptime S = Int(v_cache._static_shape_tuple[3])
                launch_decode[output.dtype, D, S, scale, fused=True](
                    output.unsafe_ptr(),
                    qkv.unsafe_ptr(),
                    k_layer,
                    v_layer,
                    page_table.unsafe_ptr(),
                    page_table.dim_size(1),
                    query_starts.unsafe_ptr(),
                    seq_lens.unsafe_ptr(),
                    num_requests,
                    num_q_heads,
                    num_kv_heads,
                    Int(max_seq_len),
                    q_norm.unsafe_ptr(),
                    k_norm.unsafe_ptr(),
                    cos_sin.unsafe_ptr(),
                    positions.unsafe_ptr(),
                    slots.unsafe_ptr(),
                    eps,
                    ctx,
                )
                return
        comptime if is_cpu[target]():
            _qk_norm_rope_store_cpu[output.dtype, D](
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
            paged_attention_cpu[output.dtype, D](
                output.unsafe_ptr(),
                q.unsafe_ptr(),
                k_layer,
                v_layer,
                page_table.unsafe_ptr(),
                page_table.dim_size(1),
                query_starts.unsafe_ptr(),
                seq_lens.unsafe_ptr(),
                num_requests,
                num_q_heads,
                num_kv_heads,
                page_size,
                scale,
            )
        elif is_gpu[target]():
            comptime S = Int(v_cache._static_shape_tuple[3])
            _qk_norm_rope_store_gpu[output.dtype, D](
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
            paged_attention_gpu[output.dtype, D, S, scale, batch_invariant](
                output.unsafe_ptr(),
                q.unsafe_ptr(),
                k_layer,
                v_layer,
                page_table.unsafe_ptr(),
                page_table.dim_size(1),
                query_starts.unsafe_ptr(),
                seq_lens.unsafe_ptr(),
                tokens,
                num_requests,
                num_q_heads,
                num_kv_heads,
                Int(max_query_len),
                Int(max_seq_len),
                ctx,
            )
        else:
            comptime assert False, "mili.rope_attention: unsupported target"
