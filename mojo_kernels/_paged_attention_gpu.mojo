"""GPU path of `mili.paged_attention`: which kernel runs on which rows.

bfloat16: requests with one query token go to `_paged_attention_gpu_decode` (split-KV over a thread block cluster), all others to
`_paged_attention_gpu_prefill` (tensor-core flash attention). A batch that mixes both launches both kernels, and each skips the
other's requests, so that a row takes the same path, and has the same bits, whatever else is in the batch. They sum in different
orders, so a token's bits may tell whether it came alone; with `INVARIANT` the prefill kernel takes all requests, and they do not.
float32 takes a simple kernel without tensor cores: there to check the others, not to be fast.
"""

from ._paged_attention_gpu_decode import launch_decode
from ._paged_attention_gpu_math import _inverse
from ._paged_attention_gpu_prefill import launch_prefill
from ._prelude import *
from max.gpu import grid_dim

comptime WARPS = 4  # of the float32 kernel


def paged_attention_gpu[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, INVARIANT: Bool
](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_tokens: Int,
    num_requests: Int,
    num_q_heads: Int,
    num_kv_heads: Int,
    max_query_len: Int,
    max_seq_len: Int,
    ctx: DeviceContext,
) raises:
    """Launches attention of T tokens of B requests; shapes as in `mili.paged_attention`, k_layer and v_layer [P, Hkv, S, D]."""
    comptime assert page_size > 0 and page_size & (page_size - 1) == 0, "page_size must be a power of two"
    if num_tokens == 0 or num_requests == 0:
        return
    if num_q_heads % num_kv_heads != 0:
        raise Error(
            "mili.paged_attention: ", num_q_heads, " query heads do not share ", num_kv_heads, " KV heads evenly"
        )
    comptime if dtype == BF16:
        if INVARIANT or max_query_len > 1:
            launch_prefill[dtype, head_dim, page_size, scale, 1 if INVARIANT else 2](
                output,
                q,
                k_layer,
                v_layer,
                page_table,
                page_table_width,
                query_starts,
                seq_lens,
                num_tokens,
                num_requests,
                num_q_heads,
                num_kv_heads,
                ctx,
            )
        comptime if not INVARIANT:
            # If every request has max_query_len rows, none has one row and the decode kernel would find nothing to do.
            if max_query_len == 1 or num_tokens != num_requests * max_query_len:
                launch_decode[dtype, head_dim, page_size, scale](
                    output,
                    q,
                    k_layer,
                    v_layer,
                    page_table,
                    page_table_width,
                    query_starts,
                    seq_lens,
                    num_requests,
                    num_q_heads,
                    num_kv_heads,
                    max_seq_len,
                    q,  # this and what follows belongs to the fused kernel
                    q,
                    rebind[Ptr[F32]](q.unsafe_bitcast[Float32]()),
                    seq_lens,
                    seq_lens,
                    0,
                    ctx,
                )
    else:
        comptime kernel = _simple_kernel[dtype, head_dim, page_size, scale]
        ctx.enqueue_function[kernel](
            output,
            q,
            k_layer,
            v_layer,
            page_table,
            Int32(page_table_width),
            query_starts,
            seq_lens,
            Int32(num_requests),
            Int32(num_kv_heads),
            grid_dim=(num_q_heads, num_tokens),
            block_dim=WARPS * WARP_SIZE,
        )


def _simple_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32
](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int32,
    num_kv_heads: Int32,
):
    """One block per (query head, token); warp w takes keys w, w+4, ..., its lanes share the head dimension."""
    comptime PART = head_dim // WARP_SIZE
    var heads = grid_dim.x
    var head = block_idx.x
    var token = block_idx.y
    var kv_head = head // (heads // Int(num_kv_heads))
    var lane = lane_id()

    # The request is the number of later requests' starts at or before this token.
    var before = Int32(0)
    for r in range(lane, Int(num_requests), WARP_SIZE):
        before += Int32(Int(query_starts[unsafe_offset=r + 1]) <= token)
    var request = Int(warp.sum(before))
    if request >= Int(num_requests):
        return
    var last = Int(seq_lens[unsafe_offset=request]) - (Int(query_starts[unsafe_offset=request + 1]) - token)
    var pages = page_table.unsafe_offset(request * Int(page_table_width))

    var row = (token * heads + head) * head_dim + lane * PART
    var qv = q.unsafe_load[width=PART](row).cast[F32]() * scale
    var m = Float32.MIN_FINITE
    var l = Float32(0)
    var o = SIMD[F32, PART](0)
    for key in range(warp_id(), last + 1, WARPS):
        var page = Int(pages[unsafe_offset=key // page_size])
        var at = ((page * Int(num_kv_heads) + kv_head) * page_size + key % page_size) * head_dim + lane * PART
        var s = warp.sum((qv * k_layer.unsafe_load[width=PART](at).cast[F32]()).reduce_add())
        var m_new = max(m, s)
        var fade = exp(m - m_new)
        var p = exp(s - m_new)
        l = l * fade + p
        o = o * fade + p * v_layer.unsafe_load[width=PART](at).cast[F32]()
        m = m_new

    var part_m = unsafe_stack_allocation[WARPS, Float32, address_space=AddressSpace.SHARED]()
    var part_l = unsafe_stack_allocation[WARPS, Float32, address_space=AddressSpace.SHARED]()
    var part_o = unsafe_stack_allocation[WARPS * head_dim, Float32, alignment=16, address_space=AddressSpace.SHARED]()
    part_m[unsafe_offset=warp_id()] = m
    part_l[unsafe_offset=warp_id()] = l
    part_o.unsafe_store(warp_id() * head_dim + lane * PART, o)
    barrier()
    if warp_id() == 0:
        m = Float32.MIN_FINITE
        comptime for w in range(WARPS):
            m = max(m, part_m[unsafe_offset=w])
        l = 0
        o = 0
        comptime for w in range(WARPS):
            var weight = exp(part_m[unsafe_offset=w] - m)
            l += weight * part_l[unsafe_offset=w]
            o += weight * part_o.unsafe_load[width=PART](w * head_dim + lane * PART)
        output.unsafe_store(row, (o * _inverse(l)).cast[dtype]())
