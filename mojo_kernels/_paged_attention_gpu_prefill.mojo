"""Prefill: causal attention of requests with FEWEST query tokens or more over a paged KV cache, bound by the tensor cores.

FlashAttention-3's plan (arXiv 2407.08608). A persistent block takes items: up to 128 query rows of one request and KV head. A row
is one (token, query head) pair, the heads that share the KV head side by side, so that they share its tiles of K and V; an item has
whole tokens. One warp brings tiles of 128 keys, page by page, by the copy engine into rings of two stages; two warps find the next
items and bring their queries (`_paged_attention_gpu_prefill_producer`); two warpgroups own 64 rows each and multiply with wgmma
(`_paged_attention_gpu_prefill_consumer`). Here is how the work falls to warps, and the launch.

The tensor map of a layer has the dims [octets of rows][halves of 64 dims][8 rows][64 dims], so that one copy of a page gives
the 128-byte-swizzled atoms of 8 x 64 that wgmma reads, K as its K-major and V as its MN-major right operand. The map of the queries
has the dims [tokens][heads][halves of 64 dims][64 dims].

Items are dealt longest first, forth and back over the blocks (`_paged_attention_gpu_prefill_items`). A queue would balance a few
per cent better, but needs a counter in memory that someone resets.

Tiles start at multiples of 128 keys and a tile that is masked for a row leaves it unchanged bit for bit, so that a row does not
depend on the batch nor on how its prompt was cut into chunks. Keys after a request's last page are zeros that the copy engine fills
in; the slots after its last key in that page are masked in K and zeroed in V, whatever they hold.
"""

from ._paged_attention_gpu_prefill_consumer import _attend
from ._paged_attention_gpu_prefill_parts import GROUPS, HALF, ROWS, SW, THREADS, TILE, _QueryTma, _Shared, _Tma
from ._paged_attention_gpu_prefill_producer import _bring_keys, _bring_queries
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from max.gpu.host import DeviceBuffer, FuncAttribute
from max.gpu.host.nvidia.tma import create_tma_descriptor
from max.gpu.intrinsics import warpgroup_reg_alloc, warpgroup_reg_dealloc
from std.utils.index import Index
from std.utils.static_tuple import StaticTuple


@__llvm_arg_metadata(k_tma, `nvvm.grid_constant`)
@__llvm_arg_metadata(v_tma, `nvvm.grid_constant`)
@__llvm_arg_metadata(q_tma, `nvvm.grid_constant`)
@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(1))
def _prefill_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, FEWEST: Int
](
    k_tma: _Tma[page_size, head_dim],
    v_tma: _Tma[page_size, head_dim],
    q_tma: _QueryTma,
    output: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int32,
    num_kv_heads: Int32,
    group: Int32,
    group_inverse: UInt32,
):
    """A producer warpgroup (a warp for K and V, two for items and queries) and GROUPS that multiply; at most a block an SM."""
    launch_dependent_grids()
    var kv_heads = Int(num_kv_heads)
    var shared = _Shared[dtype, head_dim]()
    var lane = lane_id()
    if warp_id() >= 4 * GROUPS:
        warpgroup_reg_dealloc[56]()
        var part = warp_id() - 4 * GROUPS
        if part == 0:
            _bring_keys[dtype, head_dim, page_size](
                shared, lane, k_tma, v_tma, page_table, page_table_width, kv_heads
            )
        elif part <= 2:
            _bring_queries[dtype, head_dim, FEWEST](
                shared, lane, part - 1, q_tma, query_starts, seq_lens, num_requests, kv_heads, Int(group)
            )
    else:
        warpgroup_reg_alloc[224]()
        _attend[dtype, head_dim, scale](shared, lane, output, num_kv_heads, group, group_inverse)


def launch_prefill[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, FEWEST: Int
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
    ctx: DeviceContext,
) raises:
    """Attends every request that has FEWEST query tokens or more; arguments as in `paged_attention_gpu`."""
    comptime SHARED_BYTES = _Shared[dtype, head_dim].BYTES
    comptime OCTETS = min(page_size, 8)
    var group = num_q_heads // num_kv_heads
    if group > ROWS:
        raise Error("mili.paged_attention: ", group, " query heads share a KV head, more than ", ROWS)
    var tiles = num_tokens // (ROWS // group) + num_requests

    @always_inline
    def tensor_map(layer: Ptr[dtype]) raises {imm} -> _Tma[page_size, head_dim]:
        comptime BOX = Index(
            max(min(page_size, TILE) // 8, 1), head_dim // HALF if page_size >= 8 else 1, OCTETS, HALF
        )
        return _Tma[page_size, head_dim](
            create_tma_descriptor[dtype, 4, SW](
                DeviceBuffer(ctx, layer, 1, owning=False),
                Index(1 << 30, head_dim // HALF, OCTETS, HALF),
                Index(OCTETS * head_dim, HALF, head_dim, 1),
                BOX,
            )
        )

    var k_tma = tensor_map(k_layer)
    var v_tma = tensor_map(v_layer)
    var q_tma = _QueryTma(
        create_tma_descriptor[dtype, 4, SW](
            DeviceBuffer(ctx, q, 1, owning=False),
            Index(num_tokens, num_q_heads, head_dim // HALF, HALF),
            Index(num_q_heads * head_dim, head_dim, HALF, 1),
            Index(ROWS // group, group, 1, HALF),
        )
    )
    comptime kernel = _prefill_kernel[dtype, head_dim, page_size, scale, FEWEST]
    ctx.enqueue_function[kernel](
        k_tma,
        v_tma,
        q_tma,
        output,
        page_table,
        Int32(page_table_width),
        query_starts,
        seq_lens,
        Int32(num_requests),
        Int32(num_kv_heads),
        Int32(group),
        UInt32(ceildiv(1 << 16, group)),
        grid_dim=min(num_kv_heads * tiles, ctx.default_device_info.sm_count),
        block_dim=THREADS,
        shared_mem_bytes=SHARED_BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(SHARED_BYTES)),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
