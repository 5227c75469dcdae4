"""Decode: how many blocks share a request, and how deep their rings are."""

from ._paged_attention_gpu_decode_kernel import _decode_kernel
from ._paged_attention_gpu_decode_parts import CHUNK, HEADS, PARTS, THREADS, WARPS
from ._prelude import *
from max.gpu.host import Dim, FuncAttribute
from std.bit import log2_floor

comptime CHIP = 132  # blocks that get a multiprocessor each on an H100 or H200
comptime SPLIT_KEYS = 128  # fewer are not worth it
comptime DEEP_KEYS = 256  # fewer do not fill a deep ring


def launch_decode[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, fused: Bool = False
](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int,
    num_q_heads: Int,
    num_kv_heads: Int,
    max_seq_len: Int,
    q_norm: Ptr[dtype],
    k_norm: Ptr[dtype],
    cos_sin: Ptr[F32],
    positions: Ptr[DType.int32],
    new_slots: Ptr[DType.int32],
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """Attends every request that has one query token; arguments as in `paged_attention_gpu`.

    Fused, `q` is the QKV projection, every request has one token, and `q_norm` ... `eps` are those of
    `mili.qk_norm_rope_store`; else they are not used.
    """
    var group = num_q_heads // num_kv_heads
    var head_tiles = ceildiv(group, HEADS)
    var heads = min(group, HEADS)
    # Neither choice changes a bit of the result.
    # --8<-- [start:blocks]
    var pairs = head_tiles * num_kv_heads * num_requests
    var log_blocks = 0
    if max_seq_len > SPLIT_KEYS:
        while log_blocks < log2_floor(PARTS) and pairs << (log_blocks + 1) <= CHIP:
            log_blocks += 1
        if CHIP // 8 < pairs <= CHIP // 4:  # two small blocks on a multiprocessor are better here than one
            log_blocks = log2_floor(PARTS)
    # --8<-- [end:blocks]

    @always_inline
    def launch[split: Bool, slots: Int]() raises {imm}:
        comptime kernel = _decode_kernel[dtype, head_dim, page_size, scale, slots, split, fused]
        var shared_bytes = WARPS * slots * CHUNK * head_dim * size_of[dtype]()
        shared_bytes += WARPS * heads * (head_dim + 4) * size_of[Float32]()
        comptime if split:
            shared_bytes += PARTS * WARPS * heads * (head_dim >> log_blocks) * size_of[Float32]()
        ctx.enqueue_function[kernel](
            output,
            q,
            k_layer,
            v_layer,
            page_table,
            Int32(page_table_width),
            query_starts,
            seq_lens,
            Int32(group),
            Int32(num_kv_heads),
            Int32(log_blocks),
            q_norm,
            k_norm,
            cos_sin,
            positions,
            new_slots,
            eps,
            grid_dim=(head_tiles << log_blocks, num_kv_heads, num_requests),
            block_dim=THREADS,
            cluster_dim=Dim(1 << log_blocks, 1, 1),
            attributes=pdl_launch_attributes(PDLLevel.ON),
            shared_mem_bytes=shared_bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(shared_bytes)),
        )

    # Alone on its multiprocessor, a block of many keys wants a deep ring, to keep bytes in flight. A shallow one lets a third block
    # into a multiprocessor, which short requests need more, and a second one where the sums of eight heads take room too.
    var is_deep = max_seq_len > DEEP_KEYS
    if log_blocks == 0:
        comptime if fused:
            if pairs <= CHIP and is_deep:
                launch[False, 8]()
                return
        if heads <= 4 and is_deep:
            launch[False, 6]()
        else:
            launch[False, 4]()
    else:
        comptime if fused:
            if log_blocks == 1 and is_deep:
                launch[True, 6]()
                return
            if pairs << log_blocks > CHIP:
                launch[True, 2]()
                return
        launch[True, 4]()
