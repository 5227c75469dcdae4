"""Causal attention of a ragged batch over a paged KV cache: prefill, chunked prefill and decode in one op.

Math:      s_j = scale q . k_j for j <= position(q);  out = sum_j softmax(s)_j v_j, by online softmax: for each tile of keys
           m' = max(m, max_j s_j);  l' = l e^(m - m') + sum_j e^(s_j - m');  O' = O e^(m - m') + sum_j e^(s_j - m') v_j;  out = O / l
Shapes:    out, q [T, Hq*D]; k_cache CPU [L, P, Hkv, D, S], GPU [L, P, Hkv, S, D]; v_cache [L, P, Hkv, S, D];
           page_table [B, W] int32, query_starts [B+1] int32, seq_lens [B] int32; layer, max_query_len, max_seq_len scalars.
           Row i of request b sits at position seq_lens[b] - query_starts[b+1] + i
Dtypes:    bfloat16 or float32, cache alike; scores, softmax and sums in float32, one rounding at the store
CPU:       `_paged_attention_cpu`: parallel over (tile of 32 tokens, KV head), and over chunks of 512 keys when those are few
GPU:       `_paged_attention_gpu`: split-KV for decode, tensor cores for prefill, and with batch_invariant for decode too
Bound:     bytes = sizeof(dtype) (2 T Hq D + 2 Hkv D sum_b seq_lens[b]); flops = 4 Hq D sum over rows of (position + 1)
Limits:    D is 64 or 128, S a power of two, Hq a multiple of Hkv. Slots past a request's length are never used, whatever they hold
Source:    Milakov and Gimelshein 2018 (arXiv 1805.02867); FlashAttention-2 (arXiv 2307.08691); PagedAttention (arXiv 2309.06180);
           Flash-Decoding (split-KV). Chunks here have a fixed length, so that results do not depend on the batch
"""

from ._paged_attention_cpu import paged_attention_cpu
from ._paged_attention_gpu import paged_attention_gpu
from ._prelude import *


@extensibility.register("mili.paged_attention")
struct PagedAttention:
    """Attends each row to the cached keys of its request, up to its own position."""

    @staticmethod
    def execute[
        target: StaticString, scale: Float32, batch_invariant: Bool
    ](
        output: OutputTensor[rank=2, ...],
        q: InputTensor[dtype=output.dtype, rank=2, ...],
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
            scale: Factor on the scores, 1 / sqrt(D).
            batch_invariant: Whether a row's bits may not depend on how many rows its request has.

        Args:
            output: Attended rows [T, Hq*D].
            q: Rotated queries [T, Hq*D].
            k_cache: Key cache, read.
            v_cache: Value cache, read.
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
        if output.dim_size(0) == 0:
            return
        comptime D = Int(v_cache._static_shape_tuple[4])
        comptime assert D == 64 or D == 128, "mili.paged_attention: head_dim must be 64 or 128"
        var num_kv_heads = v_cache.dim_size(2)
        var page_size = v_cache.dim_size(3)
        var layer_size = v_cache.dim_size(1) * num_kv_heads * page_size * D
        var k_layer = k_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        var v_layer = v_cache.unsafe_ptr().unsafe_offset(Int(layer) * layer_size)
        comptime if is_cpu[target]():
            paged_attention_cpu[output.dtype, D](
                output.unsafe_ptr(),
                q.unsafe_ptr(),
                k_layer,
                v_layer,
                page_table.unsafe_ptr(),
                page_table.dim_size(1),
                query_starts.unsafe_ptr(),
                seq_lens.unsafe_ptr(),
                seq_lens.dim_size(0),
                q.dim_size(1) // D,
                num_kv_heads,
                page_size,
                scale,
            )
        elif is_gpu[target]():
            comptime S = Int(v_cache._static_shape_tuple[3])
            paged_attention_gpu[output.dtype, D, S, scale, batch_invariant](
                output.unsafe_ptr(),
                q.unsafe_ptr(),
                k_layer,
                v_layer,
                page_table.unsafe_ptr(),
                page_table.dim_size(1),
                query_starts.unsafe_ptr(),
                seq_lens.unsafe_ptr(),
                q.dim_size(0),
                seq_lens.dim_size(0),
                q.dim_size(1) // D,
                num_kv_heads,
                Int(max_query_len),
                Int(max_seq_len),
                ctx,
            )
        else:
            comptime assert False, "mili.paged_attention: unsupported target"
