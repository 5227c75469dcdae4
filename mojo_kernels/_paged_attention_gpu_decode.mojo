"""Decode: attention of one query token per request over a paged KV cache, bound by the speed at which K and V are read.

A cluster of up to 8 blocks of 4 warps owns one request and one KV head with up to 8 of its query heads. Keys are dealt in
tiles of 64: tile t goes to block t mod (blocks in use), its 16-key chunk w to warp w. The blocks in use depend on the
length of the request alone, so a row has the same bits whatever the batch.

A warp fetches its chunks by cp.async into a ring of its own, without a block barrier, and multiplies with mma.sync m16n8k16:
    s [heads, keys] = q k^T, the heads as the first 8 of 16 rows, the rest zero; o^T [dims, heads] = v^T p^T
The scores that a lane computes are, in place, its part of p^T. Keys past the end are read at the request's last slot, with
weight 0. At the end warps merge through shared memory; blocks push their sums to the first, which adds them in rank order.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _exp2, _inverse, _push, _quad_max, _quad_sum
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, syncwarp
from max.gpu.compute.mma import ld_matrix, mma
from max.gpu.host import Dim, FuncAttribute
from max.gpu.memory import async_copy, async_copy_commit_group, async_copy_wait_group, external_memory
from max.gpu.primitives.cluster import cluster_arrive, cluster_wait
from std.bit import log2_floor
from std.utils.static_tuple import StaticTuple

comptime WARPS = 4
comptime THREADS = WARPS * 32
comptime CHUNK = 16  # keys of one warp at a time: the k of one mma for p v
comptime TILE = WARPS * CHUNK
comptime HEADS = 8  # query heads per block: the rows of an mma that are used
comptime MAX_BLOCKS = 8  # of a cluster; 8 is the most that every device grants
comptime TILES_PER_BLOCK = 8  # before one more block is worth its merge; blocks of a longer grid are not free either
comptime DEEP_BLOCKS = 256  # about two per multiprocessor


@always_inline
def _num_blocks[tiles_per_block: Int](seq_len: Int) -> Int:
    """How many blocks share the keys of one request: a function of its length alone."""
    return min(MAX_BLOCKS, max(1, ceildiv(ceildiv(seq_len, TILE), tiles_per_block)))


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
def _decode_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, tiles_per_block: Int, stages: Int
](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    page_table_width: Int32,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_q_heads: Int32,
    num_kv_heads: Int32,
):
    """Grid (blocks of a cluster, KV heads * groups of 8 query heads, requests)."""
    comptime ROW_VECS = head_dim // VEC
    comptime LANE_ROWS = WARP_SIZE // ROW_VECS  # keys that one cp.async of a warp covers
    comptime CHUNK_SIZE = CHUNK * head_dim
    comptime K_STEPS = head_dim // 16
    comptime O_TILES = head_dim // 16
    comptime PART_LD = head_dim + 4  # padded: the stores of the merge fall into different banks
    comptime FACTOR = scale * LOG2E
    var request = block_idx.z
    var rank = block_idx.x
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
    # Everything that says where K and V lie is loaded at once: the page of the first chunk before we know that it exists.
    var key = Int32(rank * TILE + warp_index * CHUNK)
    var token = query_starts[unsafe_offset=request]
    var next_token = query_starts[unsafe_offset=request + 1]
    var seq_len = seq_lens[unsafe_offset=request]
    var page = page_at(key)
    var num_blocks = _num_blocks[tiles_per_block](Int(seq_len))
    # Not a decode request (the prefill kernel's, or padding), or more blocks than it needs. No page is negative.
    if (next_token - token != 1) | (rank >= num_blocks) | (page < 0):
        wait_on_dependent_grids()  # also here: the next kernel takes our end for the end of all before us
        return
    if num_blocks > 1:
        cluster_arrive()  # the first block runs: its shared memory may be written to
    var last_key = seq_len - 1
    var step = Int32(num_blocks * TILE)
    var group = num_q_heads // num_kv_heads
    var head_tiles = ceildiv(group, Int32(HEADS))
    var kv_head = Int32(block_idx.y) // head_tiles
    var first_head = Int32(block_idx.y) % head_tiles * Int32(HEADS)
    var heads = min(HEADS, Int(group - first_head))
    var first_row = Int(token * num_q_heads + kv_head * group + first_head) * head_dim

    var smem = external_memory[Scalar[dtype], address_space=AddressSpace.SHARED, alignment=128]()
    var ring = smem.unsafe_offset(warp_index * stages * 2 * CHUNK_SIZE)
    # 16-byte vector c of row r is kept at c ^ (r mod 8), so that the 8 rows of an ldmatrix fall into different banks.
    var copy_row = lane // ROW_VECS
    var copy_vec = lane % ROW_VECS
    var keys = k_layer.unsafe_offset(copy_vec * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var values = v_layer.unsafe_offset(copy_vec * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var matrix = (lane % 8 + lane // 16 * 8) * head_dim + ((lane // 8 % 2) ^ (lane % 8)) * VEC

    @always_inline
    def fetch(key: Int32, chunk_page: Int32, stage: Int) {imm}:
        """Starts copying one chunk of K and V."""
        var to = ring.unsafe_offset(stage * 2 * CHUNK_SIZE)
        comptime for i in range(CHUNK // LANE_ROWS):
            var row = copy_row + i * LANE_ROWS
            var used = min(key + Int32(row), last_key)
            var page = chunk_page
            comptime if page_size < CHUNK:
                page = page_at(used)
            var at = Int(page * num_kv_heads + kv_head) * (page_size * head_dim)
            at += Int((used & Int32(page_size - 1)) * Int32(head_dim))
            var slot = row * head_dim + (copy_vec ^ (row % 8)) * VEC
            async_copy[16](keys.unsafe_offset(at), to.unsafe_offset(slot))
            async_copy[16](values.unsafe_offset(at), to.unsafe_offset(CHUNK_SIZE + slot))

    # Only the last key of a request is written by the kernel before this one, which may still run: the rest need not wait for it.
    var next = key  # of the chunk to fetch next
    comptime for stage in range(stages):
        if next + CHUNK > last_key:
            wait_on_dependent_grids()
        if next < seq_len:
            fetch(next, page if stage == 0 else page_at(next), stage)
        async_copy_commit_group()
        next += step

    wait_on_dependent_grids()
    var q_frag = Array[SIMD[dtype, 8], K_STEPS](fill=0)
    if lane // 4 < heads:
        var query = q.unsafe_offset(first_row + lane // 4 * head_dim + lane % 4 * 2)
        comptime for i in range(K_STEPS):
            var low = query.unsafe_load[width=2, alignment=4](i * 16)
            var high = query.unsafe_load[width=2, alignment=4](i * 16 + 8)
            q_frag[i] = SIMD[dtype, 8](low[0], low[1], 0, 0, high[0], high[1], 0, 0)
    var o = Array[SIMD[F32, 4], O_TILES](fill=0)
    var m = Float32.MIN_FINITE
    var l = Float32(0)
    var stage = 0
    while key < seq_len:
        async_copy_wait_group(Int32(stages - 1))
        syncwarp()
        var chunk = ring.unsafe_offset(stage * 2 * CHUNK_SIZE)
        # This lane gets, of head lane / 4, the scores of keys 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of the chunk, c = lane mod 4.
        var s = Array[SIMD[F32, 4], 2](fill=0)
        comptime for i in range(K_STEPS):
            var k = ld_matrix[simd_width=8](chunk.unsafe_offset(matrix ^ (i * 16)))
            mma(s[0], q_frag[i], k.slice[4, offset=0](), s[0])
            mma(s[1], q_frag[i], k.slice[4, offset=4](), s[1])

        var scores = SIMD[F32, 4](s[0][0], s[0][1], s[1][0], s[1][1]) * FACTOR
        var at = SIMD[DType.int32, 4](0, 1, 8, 9) + (key + Int32(lane % 4 * 2))
        scores = at.lt(seq_len).select(scores, SIMD[F32, 4](Float32.MIN_FINITE))
        var m_new = max(m, _quad_max(scores.reduce_max()))
        var fade = _exp2(m - m_new)
        m = m_new
        var p = SIMD[F32, 4](0)
        comptime for i in range(4):
            p[i] = _exp2(scores[i] - m)
        l = l * fade + p.reduce_add()
        # o^T has its heads in columns: this lane's are 2 c and 2 c + 1.
        var fade_0 = warp.shuffle_idx(fade, UInt32(lane % 4 * 8))
        var fade_1 = warp.shuffle_idx(fade, UInt32(lane % 4 * 8 + 4))
        var p_frag = p.cast[dtype]()
        comptime for i in range(O_TILES):
            var v = ld_matrix[simd_width=8, transpose=True](chunk.unsafe_offset(CHUNK_SIZE + (matrix ^ (i * 16))))
            o[i] *= SIMD[F32, 4](fade_0, fade_1, fade_0, fade_1)
            mma(o[i], v, p_frag, o[i])
        syncwarp()
        if next < seq_len:
            fetch(next, page_at(next), stage)
        async_copy_commit_group()
        next += step
        key += step
        stage = stage + 1 if stage + 1 < stages else 0

    # Merge the warps, each through its own ring: this lane has dims lane / 4 and lane / 4 + 8 of each 16, heads 2 c and 2 c + 1.
    var part_m = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
    var part_l = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
    comptime RING_FLOATS = stages * CHUNK_SIZE  # two bfloat16 chunks
    var part_o = smem.unsafe_bitcast[Float32]()
    async_copy_wait_group(0)
    syncwarp()
    l = _quad_sum(l)
    if lane % 4 == 0:
        part_m[unsafe_offset=warp_index * HEADS + lane // 4] = m
        part_l[unsafe_offset=warp_index * HEADS + lane // 4] = l
    comptime for h in range(2):
        var head = lane % 4 * 2 + h
        if head < heads:
            var to = warp_index * RING_FLOATS + head * PART_LD + lane // 4
            comptime for i in range(O_TILES):
                part_o[unsafe_offset=to + i * 16] = o[i][h]
                part_o[unsafe_offset=to + i * 16 + 8] = o[i][h + 2]
    barrier()
    # The first block's inbox: from each rank, per head, D sums and a vector (m, l, 0, 0).
    var inbox = part_o.unsafe_offset(WARPS * RING_FLOATS)
    var inbox_rank = heads * PART_LD
    comptime HEAD_VECS = head_dim // 4
    var target = output.unsafe_offset(first_row)
    if num_blocks > 1:
        cluster_wait()
    for i in range(tid, heads * HEAD_VECS, THREADS):
        var head = i // HEAD_VECS
        var column = i % HEAD_VECS * 4
        var top = Float32.MIN_FINITE
        comptime for w in range(WARPS):
            top = max(top, part_m[unsafe_offset=w * HEADS + head])
        var sum = Float32(0)
        var acc = SIMD[F32, 4](0)
        comptime for w in range(WARPS):
            var weight = _exp2(part_m[unsafe_offset=w * HEADS + head] - top)
            sum += weight * part_l[unsafe_offset=w * HEADS + head]
            acc += weight * part_o.unsafe_load[width=4, alignment=16](w * RING_FLOATS + head * PART_LD + column)
        if num_blocks == 1:
            target.unsafe_store[alignment=8](i * 4, (acc * _inverse(sum)).cast[dtype]())
        else:
            var box = inbox.unsafe_offset(rank * inbox_rank + head * PART_LD)
            _push(Int32(Int(box.unsafe_offset(column))), acc)
            if column == 0:
                _push(Int32(Int(box.unsafe_offset(head_dim))), SIMD[F32, 4](top, sum, 0, 0))
    if num_blocks == 1:
        return
    cluster_arrive()
    if rank != 0:
        return
    cluster_wait()
    for i in range(tid, heads * HEAD_VECS, THREADS):
        var box = inbox.unsafe_offset(i // HEAD_VECS * PART_LD)
        var column = i % HEAD_VECS * 4
        var top = Float32.MIN_FINITE
        for r in range(num_blocks):
            top = max(top, box[unsafe_offset=r * inbox_rank + head_dim])
        var sum = Float32(0)
        var acc = SIMD[F32, 4](0)
        for r in range(num_blocks):
            var weight = _exp2(box[unsafe_offset=r * inbox_rank + head_dim] - top)
            sum += weight * box[unsafe_offset=r * inbox_rank + head_dim + 1]
            acc += weight * box.unsafe_load[width=4, alignment=16](r * inbox_rank + column)
        target.unsafe_store[alignment=8](i * 4, (acc * _inverse(sum)).cast[dtype]())


def launch_decode[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, tiles_per_block: Int = TILES_PER_BLOCK
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
    ctx: DeviceContext,
) raises:
    """Attends every request that has one query token; arguments as in `paged_attention_gpu`."""
    var cluster = 1  # a power of two that the longest request fits; more would only add blocks that return at once
    while cluster < _num_blocks[tiles_per_block](max_seq_len):
        cluster *= 2
    var group = num_q_heads // num_kv_heads
    var columns = num_kv_heads * ceildiv(group, HEADS)

    @always_inline
    def launch[stages: Int]() raises {imm}:
        comptime kernel = _decode_kernel[dtype, head_dim, page_size, scale, tiles_per_block, stages]
        var inbox = cluster * min(group, HEADS) * (head_dim + 4) * size_of[Float32]() if cluster > 1 else 0
        var shared_bytes = WARPS * stages * 2 * CHUNK * head_dim * size_of[dtype]() + inbox
        ctx.enqueue_function[kernel](
            output,
            q,
            k_layer,
            v_layer,
            page_table,
            Int32(page_table_width),
            query_starts,
            seq_lens,
            Int32(num_q_heads),
            Int32(num_kv_heads),
            grid_dim=(cluster, columns, num_requests),
            block_dim=THREADS,
            cluster_dim=Dim(cluster, 1, 1),
            attributes=pdl_launch_attributes(PDLLevel.ON),
            shared_mem_bytes=shared_bytes,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(shared_bytes)),
        )

    # Few blocks: a deep ring keeps enough bytes in flight. Many: a shallow one leaves room for more blocks per multiprocessor.
    if cluster * columns * num_requests <= DEEP_BLOCKS:
        launch[4]()
    else:
        launch[2]()
