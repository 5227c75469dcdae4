"""The producer warps of the prefill kernel: two find items and bring their queries, one brings K and V. They multiply nothing.

All comes by the copy engine. K and V come page by page; the slots after a request's last key, which may hold anything, are zeroed
in V before the tile counts as full. The queries of an item are a box of tokens and heads, so two instructions bring them; the rows
after a request's last token are other requests' queries, which nobody looks at.
"""

from ._paged_attention_gpu_math import VEC
from ._paged_attention_gpu_prefill_items import _find, _Item
from ._paged_attention_gpu_prefill_parts import HALF, NOWHERE, RECORDS, ROWS, STAGES, TILE, _QueryTma, _Shared, _Tma
from ._prelude import *
from layout.tma_async import SharedMemBarrier
from max.gpu import syncwarp
from max.gpu.memory import cp_async_bulk_tensor_shared_cluster_global, fence_async_view_proxy
from std.utils.index import Index


@always_inline
def _bring_keys[
    dtype: DType, head_dim: Int, page_size: Int
](
    shared: _Shared[dtype, head_dim],
    lane: Int,
    ref k_tma: _Tma[page_size, head_dim],
    ref v_tma: _Tma[page_size, head_dim],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    kv_heads: Int,
):
    """One warp: K of each tile, and V of the tile before, for the block's items in turn."""
    comptime HALVES = head_dim // HALF
    comptime TILE_SIZE = TILE * head_dim
    comptime ROW_VECS = head_dim // VEC
    comptime OCTET = 8 * head_dim  # elements of eight keys: HALVES atoms of 8 x 64
    comptime BOX_ROWS = min(page_size, TILE)
    comptime BOX_HALVES = HALVES if page_size >= 8 else 1
    comptime BOXES = TILE // BOX_ROWS * (HALVES // BOX_HALVES)
    comptime PARTS = ceildiv(BOXES, WARP_SIZE)
    comptime SIDES = HALVES // BOX_HALVES  # boxes side by side
    var round = 0
    var count = 0  # tiles of keys so far
    var patches = UInt32(0)
    var request = 0
    var kv_head = 0

    # --8<-- [start:producer]
    @always_inline
    def origins(t: Int, seq_len: Int) {imm} -> Array[Int32, PARTS]:
        """Where in the cache the boxes of a tile start that this lane copies."""
        var at = Array[Int32, PARTS](fill=NOWHERE)
        var pages = page_table.unsafe_offset(request * Int(page_table_width))
        comptime for i in range(PARTS):
            var key = t * TILE + (lane + i * WARP_SIZE) // SIDES * BOX_ROWS
            if lane + i * WARP_SIZE < BOXES and key < seq_len:
                var page = Int(pages[unsafe_offset=key // page_size])
                comptime octets = max(page_size // 8, 1)
                at[i] = Int32((page * kv_heads + kv_head) * octets + key % page_size // 8)
        return at^

    @always_inline
    def copy[
        keys: Bool
    ](at: Array[Int32, PARTS], stage: Int, ref[AddressSpace.SHARED] landed: SharedMemBarrier) {imm}:
        comptime for i in range(PARTS):
            var nth = lane + i * WARP_SIZE
            if nth < BOXES:
                var half = nth % SIDES
                var row = nth // SIDES * BOX_ROWS
                cp_async_bulk_tensor_shared_cluster_global(
                    (shared.k if keys else shared.v).unsafe_offset(
                        stage * TILE_SIZE + row // 8 * OCTET + half * (8 * HALF) + row % 8 * HALF
                    ),
                    Pointer(to=k_tma.descriptor if keys else v_tma.descriptor).unsafe_bitcast[NoneType](),
                    landed.unsafe_ptr(),
                    Index(0, 0, half, Int(at[i])),
                )
    # --8<-- [end:producer]

    wait_on_dependent_grids()
    while True:
        shared.known[unsafe_offset=round % 2].wait(UInt32(round // 2 & 1))
        var item = shared.items.unsafe_offset(round % RECORDS * 8)
        var tiles = Int(item[unsafe_offset=0])
        if tiles == 0:
            break
        request = Int(item[unsafe_offset=5])
        kv_head = Int(item[unsafe_offset=4])
        var seq_len = Int(item[unsafe_offset=6])
        var at = origins(0, seq_len)
        var at_before = at.copy()
        for t in range(tiles + 1):
            var at_next = at.copy()
            if t + 1 < tiles:
                at_next = origins(t + 1, seq_len)
            if t < tiles:
                var stage = (count + t) % STAGES
                shared.empty_k[unsafe_offset=stage].wait(UInt32(((count + t) // STAGES + 1) & 1))
                if lane == 0:
                    shared.full_k[unsafe_offset=stage].expect_bytes(Int32(TILE_SIZE * 2))
                syncwarp()
                copy[True](at, stage, shared.full_k[unsafe_offset=stage])
            if t > 0:
                var stage = (count + t - 1) % STAGES
                shared.empty_v[unsafe_offset=stage].wait(UInt32(((count + t - 1) // STAGES + 1) & 1))
                if t * TILE > seq_len and seq_len % page_size != 0:
                    # Slots after the last key may hold anything, which times zero need not be zero.
                    if lane == 0:
                        shared.patched[unsafe_offset=0].expect_bytes(Int32(TILE_SIZE * 2))
                    syncwarp()
                    copy[False](at_before, stage, shared.patched[unsafe_offset=0])
                    shared.patched[unsafe_offset=0].wait(patches & 1)
                    patches += 1
                    var end = min((seq_len // page_size + 1) * page_size - (t - 1) * TILE, TILE)
                    for row in range(seq_len - (t - 1) * TILE, end):
                        if lane < ROW_VECS:
                            var to = row // 8 * OCTET + row % 8 * HALF + lane // 8 * (8 * HALF) + lane % 8 * VEC
                            shared.v.unsafe_store[alignment=16](stage * TILE_SIZE + to, SIMD[dtype, VEC](0))
                    fence_async_view_proxy()
                    syncwarp()
                    if lane == 0:
                        _ = shared.full_v[unsafe_offset=stage].arrive()
                else:
                    if lane == 0:
                        shared.full_v[unsafe_offset=stage].expect_bytes(Int32(TILE_SIZE * 2))
                    syncwarp()
                    copy[False](at_before, stage, shared.full_v[unsafe_offset=stage])
            at_before = at.copy()
            at = at_next.copy()
        count += tiles
        round += 1


@always_inline
def _bring_queries[
    dtype: DType, head_dim: Int, FEWEST: Int
](
    shared: _Shared[dtype, head_dim],
    lane: Int,
    slot: Int,
    ref q_tma: _QueryTma,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int32,
    kv_heads: Int,
    group: Int,
):
    """One of two warps, that has every other item: finds it, says what it is, and brings its queries."""
    comptime HALVES = head_dim // HALF
    var level = 0
    var above = 0
    var round = slot
    var item_tokens = UInt32(ROWS) // UInt32(group)

    @always_inline
    def next_item(round: Int) {mut level, mut above, imm} -> _Item:
        return _find[FEWEST](round, level, above, query_starts, seq_lens, num_requests, kv_heads, item_tokens)

    var item = next_item(round)
    wait_on_dependent_grids()
    while True:
        shared.empty_q[unsafe_offset=slot].wait(UInt32((round // 2 + 1) & 1))
        if lane == 0:
            var to = shared.items.unsafe_offset(round % RECORDS * 8)
            to[unsafe_offset=0] = Int32(item.tiles)
            to[unsafe_offset=1] = Int32(item.first_token)
            to[unsafe_offset=2] = Int32(item.tokens * group - 1)
            to[unsafe_offset=3] = Int32(item.first_position)
            to[unsafe_offset=4] = Int32(item.kv_head)
            to[unsafe_offset=5] = Int32(item.request)
            to[unsafe_offset=6] = Int32(item.seq_len)
            _ = shared.known[unsafe_offset=slot].arrive()
            if item.tiles > 0:
                shared.full_q[unsafe_offset=slot].expect_bytes(Int32(Int(item_tokens) * group * head_dim * 2))
                comptime for half in range(HALVES):
                    cp_async_bulk_tensor_shared_cluster_global(
                        shared.q.unsafe_offset((slot * HALVES + half) * (ROWS * HALF)),
                        Pointer(to=q_tma.descriptor).unsafe_bitcast[NoneType](),
                        shared.full_q[unsafe_offset=slot].unsafe_ptr(),
                        Index(0, half, item.kv_head * group, item.first_token),
                    )
            else:
                _ = shared.full_q[unsafe_offset=slot].arrive()
        if item.tiles == 0:
            break
        round += 2
        item = next_item(round)
