"""Decode: attention of one query token per request over a paged KV cache, bound by the speed at which K and V are read.

Work:    a cluster of 1, 2, 4 or 8 blocks of 4 warps has one request and one KV head with up to 8 query heads.
Sums:    keys come in tiles of 64; warp w has chunk w of 16 keys of each tile. The tiles of a request are cut into 8 parts. A
         warp sums its chunks of a part by online softmax; for each warp the parts are added up in order, and then the warps:
         in a lone block by the warp itself, in registers; in a cluster by the blocks that own the dims. How many blocks there
         are changes who adds, not what is added: a row has the same bits whatever the batch, and the number of blocks is free
         to fill the chip. This file makes a warp's sums, `_paged_attention_gpu_decode_merge` adds them up.
Copies:  a warp fetches its chunks by cp.async into a ring of its own, without a block barrier: K of a chunk, then V, one slot
         each. Keys past the end are zeros there, with weight 0.
Products: mma.sync m16n8k16, s [heads, keys] = q k^T, the heads as the first 8 of 16 rows, the rest zero; o^T [dims, heads] =
         v^T p^T. The scores that a lane computes are, in place, its part of p^T.
Fused:   the kernel takes the rows of the QKV projection. Each block normalises and rotates its query heads, and the block
         with the newest key also that key, which with its value goes from shared memory to the cache and into the ring. No
         block reads that slot, so none need wait for another. All older keys were written by earlier steps, and every kernel
         since has waited for the one before it to complete (wait_on_dependent_grids): they are fetched before this one waits.
         The rows themselves: `_paged_attention_gpu_decode_parts`.
"""

from ._paged_attention_gpu_decode_merge import _Sums
from ._paged_attention_gpu_decode_parts import CHUNK, HEADS, PARTS, THREADS, TILE, WARPS, _at_heads, _Projected, _tile_of
from ._paged_attention_gpu_math import LOG2E, VEC, _exp2, _quad_max
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, syncwarp
from max.gpu.compute.mma import ld_matrix, mma
from max.gpu.memory import async_copy, async_copy_commit_group, async_copy_wait_group, external_memory
from max.gpu.primitives.cluster import cluster_wait
from std.bit import log2_floor
from std.utils.static_tuple import StaticTuple


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(min(3, 12 // slots)))
def _decode_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, slots: Int, split: Bool, fused: Bool
](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    group: Int32,
    num_kv_heads: Int32,
    log_blocks: Int32,
    q_norm: Ptr[dtype],
    k_norm: Ptr[dtype],
    cos_sin: Ptr[F32],
    positions: Ptr[DType.int32],
    new_slots: Ptr[DType.int32],
    eps: Float32,
):
    """Grid (blocks of a cluster * eights of query heads, KV heads, requests); one block a cluster unless `split`."""
    comptime ROW_VECS = head_dim // VEC
    comptime LANE_ROWS = WARP_SIZE // ROW_VECS  # keys that one cp.async of a warp covers
    comptime CHUNK_SIZE = CHUNK * head_dim
    comptime K_STEPS = head_dim // 16
    comptime O_TILES = head_dim // 16
    comptime Q_LD = _Projected[dtype, head_dim, fused].Q_LD
    comptime FACTOR = scale * LOG2E
    var request = block_idx.z
    var num_blocks = Int32(1) << log_blocks if split else Int32(1)
    var rank = Int32(block_idx.x) & (num_blocks - 1)
    var first_head = (Int32(block_idx.x) >> log_blocks) * Int32(HEADS)  # of the group
    var kv_head = Int32(block_idx.y)
    var tid = thread_idx.x
    var warp_index = warp_id()
    var lane = lane_id()
    var pages = page_table.unsafe_offset(request * Int(page_table_width)).unsafe_address_space_cast[
        AddressSpace.GLOBAL
    ]()

    @always_inline
    def page_at(key: Int32) {imm} -> Int32:
        return pages[unsafe_offset=Int(min(key >> Int32(log2_floor(page_size)), page_table_width - 1))]

    launch_dependent_grids()
    # Everything that the loads after it depend on is loaded at once.
    var token = Int32(request)
    var rows = Int32(1)
    var position = Int32(0)
    var new_slot = Int32(0)
    comptime if fused:
        position = positions[unsafe_offset=request]
        new_slot = new_slots[unsafe_offset=request]
    else:
        token = query_starts[unsafe_offset=request]
        rows = query_starts[unsafe_offset=request + 1] - token
    var seq_len = seq_lens[unsafe_offset=request]
    var chunk_pages = Int32(0)  # lane i has the page of this warp's i-th chunk, of 32
    comptime if not split:
        chunk_pages = page_at(Int32(warp_index * CHUNK + lane * TILE))
    if rows != 1:  # the prefill kernel's, or padding
        wait_on_dependent_grids()  # also here: the next kernel takes our end for the end of all before us
        return
    # --8<-- [start:parts]
    var tiles = ceildiv(seq_len, Int32(TILE))

    @always_inline
    def tile_of(part: Int32) {imm} -> Int32:
        """The first tile of a part: part * tiles / 8."""
        return _tile_of(part, tiles)

    var first_part = (rank << Int32(log2_floor(PARTS))) >> log_blocks
    var last_part = ((rank + 1) << Int32(log2_floor(PARTS))) >> log_blocks
    # --8<-- [end:parts]
    var key = tile_of(first_part) * Int32(TILE) + Int32(warp_index * CHUNK)
    var last_key = seq_len - 1
    var fetched_keys = last_key if fused else seq_len  # of these the cache holds K and V
    var end_key = min(tile_of(last_part) * Int32(TILE), seq_len)
    comptime if split:
        chunk_pages = page_at(key + Int32(lane * TILE))
    var heads = min(HEADS, Int(group - first_head))
    var first_row = Int((token * num_kv_heads + kv_head) * group + first_head) * head_dim
    var projected = _Projected[dtype, head_dim, fused](
        heads, position, q_norm, k_norm, cos_sin, token, group, first_head, kv_head, num_kv_heads
    )
    var smem = external_memory[Scalar[dtype], address_space=AddressSpace.SHARED, alignment=128]()
    var ring = smem.unsafe_offset(warp_index * slots * CHUNK_SIZE)
    var sums = _Sums[head_dim, split](
        smem.unsafe_offset(WARPS * slots * CHUNK_SIZE).unsafe_bitcast[Float32](), warp_index, heads, log_blocks
    )
    comptime if split:
        sums.expect(tiles)
    # 16-byte vector c of row r is kept at c ^ (r mod 8), so that the 8 rows of an ldmatrix fall into different banks.
    var copy_row = lane // ROW_VECS
    var copy_vec = lane % ROW_VECS
    var keys = k_layer.unsafe_offset(copy_row * head_dim + copy_vec * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var values = v_layer.unsafe_offset(copy_row * head_dim + copy_vec * VEC).unsafe_address_space_cast[
        AddressSpace.GLOBAL
    ]()
    var copy_at = copy_row * head_dim + (copy_vec ^ copy_row) * VEC  # LANE_ROWS divides 8
    var matrix = (lane % 8 + lane // 16 * 8) * head_dim + ((lane // 8 % 2) ^ (lane % 8)) * VEC
    var ahead = 0  # number of the chunk to fetch next
    var ahead_key = key
    var ahead_page = Int32(0)

    # --8<-- [start:fetch]
    @always_inline
    def fetch[of_values: Bool](slot: Int) {mut ahead, mut ahead_key, mut ahead_page, mut chunk_pages, imm}:
        """Starts copying K of the chunk ahead, or V and then moves on to the chunk after it."""
        if ahead_key < end_key:
            comptime if not of_values:
                if ahead % 32 == 0 and ahead > 0:
                    chunk_pages = page_at(ahead_key + Int32(lane * TILE))
                ahead_page = warp.shuffle_idx(chunk_pages, UInt32(ahead % 32))
            var source = values if of_values else keys
            var to = ring.unsafe_offset(slot * CHUNK_SIZE)
            var line = Int(ahead_page * num_kv_heads + kv_head) * page_size + Int(ahead_key & Int32(page_size - 1))
            var there = Int(fetched_keys - ahead_key) - copy_row
            comptime for i in range(CHUNK // LANE_ROWS):
                comptime ROW = i * LANE_ROWS
                comptime if page_size < CHUNK:
                    var used = min(ahead_key + Int32(copy_row + ROW), last_key)
                    line = Int(page_at(used) * num_kv_heads + kv_head) * page_size
                    line += Int(used & Int32(page_size - 1)) - copy_row - ROW
                async_copy[16, fill=Scalar[dtype](0)](
                    source.unsafe_offset(line * head_dim + ROW * head_dim),
                    to.unsafe_offset(ROW * head_dim + (copy_at ^ (ROW % 8 * VEC))),
                    Int32(16) if ROW < there else Int32(0),
                )
        async_copy_commit_group()
        comptime if of_values:
            ahead += 1
            ahead_key += Int32(TILE)
    # --8<-- [end:fetch]

    # Only the last key of a request is written by this step, in the kernel before this one, which may still run, or here.
    comptime for slot in range(slots):
        comptime if not fused:
            if ahead_key + CHUNK > last_key:
                wait_on_dependent_grids()
        fetch[slot % 2 == 1](slot)

    comptime if split:
        cluster_wait()  # all blocks run, and their inboxes are ready
    wait_on_dependent_grids()
    var q_rows = unsafe_stack_allocation[HEADS * Q_LD, Scalar[dtype], alignment=16, address_space=AddressSpace.SHARED]()
    var new_kv = unsafe_stack_allocation[2 * head_dim, Scalar[dtype], alignment=16, address_space=AddressSpace.SHARED]()
    comptime if fused:
        projected.place[page_size](
            warp_index,
            q_rows,
            new_kv,
            q,
            k_layer,
            v_layer,
            first_head,
            kv_head,
            num_kv_heads,
            heads,
            new_slot,
            rank == num_blocks - 1,
            eps,
        )
    else:
        for i in range(tid, heads * ROW_VECS, THREADS):
            var vector = q.unsafe_load[width=VEC, alignment=16](first_row + i * VEC)
            q_rows.unsafe_store[alignment=16](i // ROW_VECS * Q_LD + i % ROW_VECS * VEC, vector)
    barrier()
    # Rows past the last head repeat it: what they give is not used.
    var q_row = q_rows.unsafe_offset(min(lane % 8, heads - 1) * Q_LD + lane // 8 * VEC)
    var q_frag = Array[SIMD[dtype, 8], K_STEPS](fill=0)
    comptime for i in range(K_STEPS // 2):
        var x = ld_matrix[simd_width=8](q_row.unsafe_offset(i * 32))
        q_frag[2 * i] = SIMD[dtype, 8](x[0], x[1], 0, 0, x[2], x[3], 0, 0)
        q_frag[2 * i + 1] = SIMD[dtype, 8](x[4], x[5], 0, 0, x[6], x[7], 0, 0)

    @always_inline
    def put_new(values: Int, slot: Int) {imm}:
        """Puts the newest k or v where the lane's own cp.async has left zeros."""
        comptime if fused:
            var row = Int(last_key - key)
            if row < CHUNK and copy_row == row % LANE_ROWS:
                var to = slot * CHUNK_SIZE + row * head_dim + (copy_vec ^ (row % 8)) * VEC
                var vector = new_kv.unsafe_load[width=VEC, alignment=16](values * head_dim + copy_vec * VEC)
                ring.unsafe_store[alignment=16](to, vector)

    var slot = 0
    for part in range(first_part, last_part):
        var part_end = min(tile_of(part + 1) * Int32(TILE), seq_len)
        if tile_of(part) == tile_of(part + 1):
            continue
        var o = Array[SIMD[F32, 4], O_TILES](fill=0)
        var m = Float32.MIN_FINITE
        var l = Float32(0)
        while key < part_end:
            # --8<-- [start:products]
            async_copy_wait_group(Int32(slots - 1))
            put_new(0, slot)
            syncwarp()
            var chunk = ring.unsafe_offset(slot * CHUNK_SIZE)
            # This lane gets, of head lane / 4, the scores of keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of the chunk.
            var chains = Array[SIMD[F32, 4], 4](fill=0)  # of even and of odd steps: two short chains of mma, not a long one
            comptime for i in range(K_STEPS):
                var k = ld_matrix[simd_width=8](chunk.unsafe_offset(matrix ^ (i * 16)))
                comptime to = i % 2 * 2
                mma(chains[to], q_frag[i], k.slice[4, offset=0](), chains[to])
                mma(chains[to + 1], q_frag[i], k.slice[4, offset=4](), chains[to + 1])
            syncwarp()
            fetch[slots % 2 == 1](slot)
            slot = slot + 1 if slot + 1 < slots else 0

            var scores = SIMD[F32, 4](chains[0][0], chains[0][1], chains[1][0], chains[1][1])
            scores = (scores + SIMD[F32, 4](chains[2][0], chains[2][1], chains[3][0], chains[3][1])) * FACTOR
            var at = SIMD[DType.int32, 4](0, 1, 8, 9) + (key + Int32(lane % 4 * 2))
            scores = at.lt(seq_len).select(scores, SIMD[F32, 4](Float32.MIN_FINITE))
            var top = max(m, _quad_max(scores.reduce_max()))
            var fade = _exp2(m - top)
            m = top
            var p = SIMD[F32, 4](0)
            comptime for i in range(4):
                p[i] = _exp2(scores[i] - m)
            l = l.fma(fade, p.reduce_add())
            var fades = _at_heads(fade)
            var p_frag = p.cast[dtype]()
            async_copy_wait_group(Int32(slots - 1))
            put_new(1, slot)
            syncwarp()
            chunk = ring.unsafe_offset(slot * CHUNK_SIZE)
            comptime for i in range(O_TILES):
                var v = ld_matrix[simd_width=8, transpose=True](chunk.unsafe_offset(matrix ^ (i * 16)))
                o[i] *= fades
                mma(o[i], v, p_frag, o[i])
            # --8<-- [end:products]
            syncwarp()
            fetch[slots % 2 == 0](slot)
            slot = slot + 1 if slot + 1 < slots else 0
            key += Int32(TILE)
        sums.add_part(part, o, m, l, num_blocks)

    sums.store(output, first_row, rank, tiles)
