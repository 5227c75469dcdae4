"""Prefill: causal attention of requests with several query tokens over a paged KV cache, bound by the tensor cores.

FlashAttention-3's plan (arXiv 2407.08608). A persistent block takes items: 128 query rows of one request and KV head. A row is one
(token, query head) pair, the heads that share the KV head side by side, so that they share its tiles of K and V. One warp brings
tiles of 128 keys, page by page, by the copy engine into rings of two stages; three warps gather the next item's queries meanwhile;
two warpgroups own 64 rows each and multiply with wgmma. In a warpgroup the scores of a tile are under way with the outputs of the
tile before, also from one item to the next, and softmax runs while those outputs are summed; named barriers let the warpgroups take
turns, so that one's softmax runs during the other's products. Scores and outputs stay in registers, and the scores of one product
are, in place, the left operand of the next.

The tensor map of a layer has the dims [octets of rows][halves of 64 dims][8 rows][64 dims], so that one copy of a page gives
the 128-byte-swizzled atoms of 8 x 64 that wgmma reads, K as its K-major and V as its MN-major right operand.

Items are dealt longest first, forth and back over the blocks (`_paged_attention_gpu_prefill_items`). A queue would balance a few
per cent better, but needs a counter in memory that someone resets.

Tiles start at multiples of 128 keys and a tile that is masked for a row leaves it unchanged bit for bit, so that a row does not
depend on the batch nor on how its prompt was cut into chunks. Keys after a request's last page are zeros that the copy engine fills
in; the slots after its last key in that page are masked in K and zeroed in V, whatever they hold.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _inverse, _quad_sum
from ._paged_attention_gpu_prefill_items import _find, _Item
from ._paged_attention_gpu_prefill_parts import (
    GROUPS,
    HALF,
    NOWHERE,
    ROWS,
    STAGES,
    SW,
    THREADS,
    TILE,
    _pack,
    _pin,
    _release,
    _softmax,
    _Tma,
)
from ._prelude import *
from layout.tma_async import SharedMemBarrier
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, grid_dim, syncwarp
from max.gpu.compute.mma import (
    WGMMADescriptor,
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.host import DeviceBuffer, FuncAttribute
from max.gpu.host.nvidia.tma import create_tma_descriptor
from max.gpu.intrinsics import warpgroup_reg_alloc, warpgroup_reg_dealloc
from max.gpu.memory import (
    async_copy,
    async_copy_commit_group,
    async_copy_wait_group,
    cp_async_bulk_tensor_shared_cluster_global,
    external_memory,
    fence_async_view_proxy,
    fence_mbarrier_init,
)
from max.gpu.sync import named_barrier, named_barrier_arrive
from std.utils.index import Index
from std.utils.static_tuple import StaticTuple


@__llvm_arg_metadata(k_tma, `nvvm.grid_constant`)
@__llvm_arg_metadata(v_tma, `nvvm.grid_constant`)
@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(1))
def _prefill_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32
](
    k_tma: _Tma[page_size, head_dim],
    v_tma: _Tma[page_size, head_dim],
    output: Ptr[dtype],
    q: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int32,
    num_q_heads: Int32,
    num_kv_heads: Int32,
    group_inverse: UInt64,
):
    """A producer warpgroup (one warp for K and V, three for q) and GROUPS that multiply; persistent, at most a block an SM."""
    comptime HALVES = head_dim // HALF
    comptime TILE_SIZE = TILE * head_dim
    comptime Q_SIZE = ROWS * head_dim
    comptime S_WIDTH = TILE // 2  # registers of a thread for 64 rows
    comptime O_WIDTH = head_dim // 2
    comptime FACTOR = scale * LOG2E
    comptime ROW_VECS = head_dim // VEC
    comptime OCTET = 8 * head_dim  # elements of eight keys: HALVES atoms of 8 x 64
    comptime BOX_ROWS = min(page_size, TILE)
    comptime BOX_HALVES = HALVES if page_size >= 8 else 1
    comptime BOXES = TILE // BOX_ROWS * (HALVES // BOX_HALVES)
    launch_dependent_grids()
    var kv_heads = Int(num_kv_heads)
    var group = Int(UInt32(num_q_heads) // UInt32(num_kv_heads))
    # [two Q tiles][STAGES K tiles][STAGES V tiles]
    var sq = external_memory[Scalar[dtype], address_space=AddressSpace.SHARED, alignment=1024]()
    var sk = sq.unsafe_offset(2 * Q_SIZE)
    var sv = sk.unsafe_offset(STAGES * TILE_SIZE)
    var full_q = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty_q = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var full_k = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty_k = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var full_v = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty_v = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var patched = unsafe_stack_allocation[1, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var items = unsafe_stack_allocation[16, Int32, alignment=16, address_space=AddressSpace.SHARED]()
    if thread_idx.x == 0:
        comptime for i in range(2):
            full_q[unsafe_offset=i].init(3)
            empty_q[unsafe_offset=i].init(GROUPS * 4)
        comptime for i in range(STAGES):
            full_k[unsafe_offset=i].init(1)
            full_v[unsafe_offset=i].init(1)
            empty_k[unsafe_offset=i].init(GROUPS)
            empty_v[unsafe_offset=i].init(GROUPS)
        patched[unsafe_offset=0].init(1)
        fence_mbarrier_init()
    barrier()
    var lane = lane_id()

    if warp_id() >= 4 * GROUPS:
        warpgroup_reg_dealloc[56]()
        var part = warp_id() - 4 * GROUPS

        var level = 0
        var above = 0

        @always_inline
        def next_item(round: Int) {mut level, mut above, imm} -> _Item:
            return _find(round, level, above, query_starts, seq_lens, num_requests, kv_heads, group, group_inverse)

        if part == 0:
            comptime PARTS = ceildiv(BOXES, WARP_SIZE)
            comptime SIDES = HALVES // BOX_HALVES  # boxes side by side
            var round = 0
            var count = 0  # tiles of keys so far
            var patches = UInt32(0)
            var item = next_item(round)

            @always_inline
            def origins(t: Int, seq_len: Int) {imm} -> Array[Int32, PARTS]:
                """Where in the cache the boxes of a tile start that this lane copies."""
                var at = Array[Int32, PARTS](fill=NOWHERE)
                var pages = page_table.unsafe_offset(item.request * Int(page_table_width))
                comptime for i in range(PARTS):
                    var key = t * TILE + (lane + i * WARP_SIZE) // SIDES * BOX_ROWS
                    if lane + i * WARP_SIZE < BOXES and key < seq_len:
                        var page = Int(pages[unsafe_offset=key // page_size])
                        comptime octets = max(page_size // 8, 1)
                        at[i] = Int32((page * kv_heads + item.kv_head) * octets + key % page_size // 8)
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
                            (sk if keys else sv).unsafe_offset(
                                stage * TILE_SIZE + row // 8 * OCTET + half * (8 * HALF) + row % 8 * HALF
                            ),
                            Pointer(to=k_tma.descriptor if keys else v_tma.descriptor).unsafe_bitcast[NoneType](),
                            landed.unsafe_ptr(),
                            Index(0, 0, half, Int(at[i])),
                        )

            wait_on_dependent_grids()
            while item.tiles > 0:
                var tiles = item.tiles
                var seq_len = Int(seq_lens[unsafe_offset=item.request])
                var next = item
                var at = origins(0, seq_len)
                var at_before = at.copy()
                for t in range(tiles + 1):
                    var at_next = at.copy()
                    if t + 1 < tiles:
                        at_next = origins(t + 1, seq_len)
                    if t < tiles:
                        var stage = (count + t) % STAGES
                        empty_k[unsafe_offset=stage].wait(UInt32(((count + t) // STAGES + 1) & 1))
                        if lane == 0:
                            full_k[unsafe_offset=stage].expect_bytes(Int32(TILE_SIZE * 2))
                        syncwarp()
                        copy[True](at, stage, full_k[unsafe_offset=stage])
                    if t > 0:
                        var stage = (count + t - 1) % STAGES
                        empty_v[unsafe_offset=stage].wait(UInt32(((count + t - 1) // STAGES + 1) & 1))
                        if t * TILE > seq_len and seq_len % page_size != 0:
                            # Slots after the last key may hold anything, which times zero need not be zero.
                            if lane == 0:
                                patched[unsafe_offset=0].expect_bytes(Int32(TILE_SIZE * 2))
                            syncwarp()
                            copy[False](at_before, stage, patched[unsafe_offset=0])
                            patched[unsafe_offset=0].wait(patches & 1)
                            patches += 1
                            var end = min((seq_len // page_size + 1) * page_size - (t - 1) * TILE, TILE)
                            for row in range(seq_len - (t - 1) * TILE, end):
                                if lane < ROW_VECS:
                                    var to = row // 8 * OCTET + row % 8 * HALF + lane // 8 * (8 * HALF) + lane % 8 * VEC
                                    sv.unsafe_store[alignment=16](stage * TILE_SIZE + to, SIMD[dtype, VEC](0))
                            fence_async_view_proxy()
                            syncwarp()
                            if lane == 0:
                                _ = full_v[unsafe_offset=stage].arrive()
                        else:
                            if lane == 0:
                                full_v[unsafe_offset=stage].expect_bytes(Int32(TILE_SIZE * 2))
                            syncwarp()
                            copy[False](at_before, stage, full_v[unsafe_offset=stage])
                    if t == 1:  # while the consumers are busy with the first tiles
                        next = next_item(round + 1)
                    at_before = at.copy()
                    at = at_next.copy()
                count += tiles
                round += 1
                item = next
        else:
            var round = 0
            var item = next_item(round)
            wait_on_dependent_grids()
            while True:
                var slot = round % 2
                empty_q[unsafe_offset=slot].wait(UInt32((round // 2 + 1) & 1))
                if item.tiles > 0:
                    for i in range(part - 1, ROWS * ROW_VECS // WARP_SIZE, 3):
                        var row = i * (WARP_SIZE // ROW_VECS) + lane // ROW_VECS
                        var vec = lane % ROW_VECS
                        var in_request = item.first_row + min(row, item.last_row)
                        var token = Int((UInt64(in_request) * group_inverse) >> 32)
                        var head = item.kv_head * group + in_request - token * group
                        var at = ((item.first_token + token) * Int(num_q_heads) + head) * head_dim + vec * VEC
                        var to = (
                            slot * Q_SIZE
                            + row // 64 * (64 * head_dim)
                            + vec // 8 * (64 * HALF)
                            + row % 64 * HALF
                            + ((vec % 8) ^ (row % 8)) * VEC
                        )
                        async_copy[16](
                            q.unsafe_offset(at).unsafe_address_space_cast[AddressSpace.GLOBAL](),
                            sq.unsafe_offset(to),
                        )
                    async_copy_commit_group()
                if part == 1 and lane == 0:
                    var to = items.unsafe_offset(slot * 8)
                    to[unsafe_offset=0] = Int32(item.tiles)
                    to[unsafe_offset=1] = Int32(item.first_token)
                    to[unsafe_offset=2] = Int32(item.first_row)
                    to[unsafe_offset=3] = Int32(item.last_row)
                    to[unsafe_offset=4] = Int32(item.first_position)
                    to[unsafe_offset=5] = Int32(item.kv_head)
                async_copy_wait_group(0)
                fence_async_view_proxy()
                syncwarp()
                if lane == 0:
                    _ = full_q[unsafe_offset=slot].arrive()
                if item.tiles == 0:
                    break
                round += 1
                item = next_item(round)
    else:
        warpgroup_reg_alloc[224]()
        var wg = warp_id() // 4
        var warp_row = warp_id() * 16
        var count = 0  # tiles of keys so far
        var turn = 0  # items so far
        # A lane has rows lane / 4 and lane / 4 + 8 of its warp's 16: index h.
        var position = Array[Int32, 2](fill=0)
        var m = Array[Float32, 2](fill=Float32.MIN_FINITE)
        var l = Array[Float32, 2](fill=0)
        var fade = Array[Float32, 2](fill=0)
        var s = SIMD[F32, S_WIDTH](0)
        var o = SIMD[F32, O_WIDTH](0)
        var p = Array[SIMD[dtype, 8], TILE // 16](fill=0)

        @always_inline
        def scores(slot: Int, stage: Int) {mut s, imm}:
            var a = WGMMADescriptor[dtype].create[64, 1, SW](sq.unsafe_offset(slot * Q_SIZE + wg * 64 * head_dim))
            var b = WGMMADescriptor[dtype].create[OCTET * 2 // 16, 1, SW](sk.unsafe_offset(stage * TILE_SIZE))
            _pin(s)
            wgmma_fence_aligned()
            comptime for k in range(head_dim // 16):
                comptime at_a = (k // 4 * (64 * HALF) + k % 4 * 16) * 2
                comptime at_b = (k // 4 * (8 * HALF) + k % 4 * 16) * 2
                s = wgmma_async[64, TILE, 16, a_type=dtype, b_type=dtype, scale_d=0 if k == 0 else 1](
                    a + at_a, b + at_b, s
                )
            wgmma_commit_group_sync()

        @always_inline
        def outputs(stage: Int) {mut o, imm}:
            var v = WGMMADescriptor[dtype].create[OCTET * 2 // 16, 8 * HALF * 2 // 16, SW](
                sv.unsafe_offset(stage * TILE_SIZE)
            )
            _pin(o)
            wgmma_fence_aligned()
            comptime for k in range(TILE // 16):
                o = wgmma_async[64, head_dim, 16, a_type=dtype, b_type=dtype, layout_b="row"](
                    p[k], v + k * 2 * OCTET * 2, o
                )
            wgmma_commit_group_sync()

        @always_inline
        def store(slot: Int, l: Array[Float32, 2]) {imm}:
            # The item's queries are not needed any more: each warp turns its outputs into whole rows in their place.
            var group_q = sq.unsafe_offset(slot * Q_SIZE + wg * 64 * head_dim)
            var item = items.unsafe_offset(slot * 8)
            var first_token = Int(item[unsafe_offset=1])
            var first_row = Int(item[unsafe_offset=2])
            var last_row = Int(item[unsafe_offset=3])
            var first_head = Int(item[unsafe_offset=5]) * group
            named_barrier[128](Int32(4 + wg))
            comptime for h in range(2):
                var factor = _inverse(_quad_sum(l[h]))
                var row = warp_row % 64 + h * 8 + lane // 4
                comptime for n in range(head_dim // 8):
                    var pair = SIMD[F32, 2](o[n * 4 + h * 2], o[n * 4 + h * 2 + 1]) * factor
                    var at = n // 8 * (64 * HALF) + row * HALF + ((n % 8) ^ (row % 8)) * VEC + lane % 4 * 2
                    group_q.unsafe_store[alignment=4](at, pair.cast[dtype]())
            syncwarp()
            comptime WARP_ROWS = WARP_SIZE // ROW_VECS
            comptime for i in range(16 // WARP_ROWS):
                var row = warp_row + lane // ROW_VECS + i * WARP_ROWS
                var c = lane % ROW_VECS
                if row <= last_row:
                    var at = c // 8 * (64 * HALF) + row % 64 * HALF + ((c % 8) ^ (row % 8)) * VEC
                    var token = Int((UInt64(first_row + row) * group_inverse) >> 32)
                    var head = first_head + first_row + row - token * group
                    output.unsafe_store[alignment=16](
                        ((first_token + token) * Int(num_q_heads) + head) * head_dim + c * VEC,
                        group_q.unsafe_load[width=VEC, alignment=16](at),
                    )
            syncwarp()
            if lane == 0:
                _ = empty_q[unsafe_offset=slot].arrive()

        # Item by item and tile by tile, the next scores are under way with the last outputs: also from item to item,
        # where the outputs that the first item finds are of no one, and thrown away.
        if wg == 1:
            named_barrier_arrive[256](2)
        var before = 0
        while True:
            var slot = turn % 2
            full_q[unsafe_offset=slot].wait(UInt32(turn // 2 & 1))
            var item = items.unsafe_offset(slot * 8)
            var tiles = Int(item[unsafe_offset=0])
            if tiles == 0:
                break
            var first_row = Int(item[unsafe_offset=2])
            var first_position = Int(item[unsafe_offset=4])

            @always_inline
            def position_of(row: Int) {imm} -> Int:
                """A division by the group, without dividing."""
                return first_position + Int((UInt64(first_row + row) * group_inverse) >> 32)

            var unmasked = (position_of(wg * 64) + 1) // TILE
            comptime for h in range(2):
                position[h] = Int32(position_of(warp_row + h * 8 + lane // 4))
            var before_phase = UInt32((count - 1) // STAGES & 1)
            var stage = count % STAGES
            full_k[unsafe_offset=stage].wait(UInt32(count // STAGES & 1))
            named_barrier[256](Int32(2 + wg))
            scores(slot, stage)
            if turn > 0:
                full_v[unsafe_offset=before].wait(before_phase)
            outputs(before)
            named_barrier_arrive[256](Int32(3 - wg))
            wgmma_wait_group_sync[1]()
            _pin(s)
            _release(empty_k[unsafe_offset=stage])
            var sums = l.copy()
            comptime for h in range(2):
                m[h] = Float32.MIN_FINITE
                l[h] = 0
            _softmax[FACTOR](0, unmasked, position, s, m, l, fade)
            _pin(s)  # or the compiler moves the softmax behind the wait
            wgmma_wait_group_sync()
            _pin(o)
            if turn > 0:
                _release(empty_v[unsafe_offset=before])
                store(slot ^ 1, sums)
            o = SIMD[F32, O_WIDTH](0)
            p = _pack[dtype](s)
            before = stage
            count += 1
            for t in range(1, tiles):
                before_phase = UInt32((count - 1) // STAGES & 1)
                stage = count % STAGES
                full_k[unsafe_offset=stage].wait(UInt32(count // STAGES & 1))
                named_barrier[256](Int32(2 + wg))
                scores(slot, stage)
                full_v[unsafe_offset=before].wait(before_phase)
                outputs(before)
                named_barrier_arrive[256](Int32(3 - wg))
                wgmma_wait_group_sync[1]()
                _pin(s)
                _release(empty_k[unsafe_offset=stage])
                _softmax[FACTOR](t, unmasked, position, s, m, l, fade)
                _pin(s)
                wgmma_wait_group_sync()
                _pin(o)
                _release(empty_v[unsafe_offset=before])
                comptime for h in range(2):
                    comptime for n in range(head_dim // 8):
                        o[n * 4 + h * 2] *= fade[h]
                        o[n * 4 + h * 2 + 1] *= fade[h]
                p = _pack[dtype](s)
                before = stage
                count += 1
            turn += 1
        if turn > 0:
            full_v[unsafe_offset=before].wait(UInt32((count - 1) // STAGES & 1))
            outputs(before)
            wgmma_wait_group_sync()
            _pin(o)
            store((turn - 1) % 2, l)


def launch_prefill[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32
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
    """Attends every request that has more than one query token; arguments as in `paged_attention_gpu`."""
    comptime SHARED_BYTES = (2 * ROWS + 2 * STAGES * TILE) * head_dim * size_of[dtype]()
    comptime OCTETS = min(page_size, 8)
    var group = num_q_heads // num_kv_heads
    var tiles = num_tokens * group // ROWS + num_requests

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
    comptime kernel = _prefill_kernel[dtype, head_dim, page_size, scale]
    ctx.enqueue_function[kernel](
        k_tma,
        v_tma,
        output,
        q,
        page_table,
        Int32(page_table_width),
        query_starts,
        seq_lens,
        Int32(num_requests),
        Int32(num_q_heads),
        Int32(num_kv_heads),
        UInt64(ceildiv(1 << 32, group)),
        grid_dim=min(num_kv_heads * tiles, ctx.default_device_info.sm_count),
        block_dim=THREADS,
        shared_mem_bytes=SHARED_BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(SHARED_BYTES)),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
