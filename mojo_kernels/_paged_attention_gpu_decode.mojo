"""Decode: attention of one query token per request over a paged KV cache, bound by the speed at which K and V are read.

A cluster of up to 8 blocks owns one request and one KV head (with up to 8 query heads that share it); a block has 4 warps. Keys are
dealt in tiles of 64: tile t goes to block t mod (blocks in use), its 16-key chunk w to warp w. How many blocks are in use depends
on the length of the request alone, so a row has the same bits whatever the batch.

One warp, one chunk: K and V go from the cache straight into registers, 16 bytes at a time, and from there into mma.sync m16n8k16:
    s [heads, keys] = q k^T, the heads as the first 8 of 16 rows, the rest zero; o^T [dims, heads] = v^T p^T
A dot product may add its terms in any order, and dims may be dealt to rows in any order: so the 16 bytes that a lane holds of q and
of k serve as its columns of two k16 steps, the 16 bytes that it holds of v as its row of 8 mma tiles, and the scores that a lane
computes are, in place, its part of p^T. No shared memory is needed before the end: then warps merge through shared memory and
blocks through distributed shared memory, in rank order.

Keys past the end of the request are read at its last slot instead: nothing unused is touched, and their weight is 0.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _exp2, _inverse, _quad_max, _quad_sum
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, cluster_sync
from max.gpu.compute.mma import mma
from max.gpu.host import Dim
from std.bit import log2_floor
from std.sys import inlined_assembly
from std.sys import _RegisterPackType
from std.utils.static_tuple import StaticTuple

comptime WARPS = 4
comptime CHUNK = 16  # keys of one warp at a time: the k of one mma for p v
comptime TILE = WARPS * CHUNK
comptime HEADS = 8  # query heads per block: the rows of an mma that are used
comptime MAX_BLOCKS = 8  # of a cluster; 8 is the most that every device grants
comptime TILES_PER_BLOCK = 4  # before one more block is worth its merge


@always_inline
def _num_blocks[tiles_per_block: Int](seq_len: Int) -> Int:
    """How many blocks share the keys of one request: a function of its length alone."""
    return min(MAX_BLOCKS, max(1, ceildiv(ceildiv(seq_len, TILE), tiles_per_block)))


@always_inline
def _load_peer(address: Int32, rank: Int) -> SIMD[F32, 4]:
    """Loads 16 bytes at the same shared-memory address of another block of the cluster."""
    var r = inlined_assembly[
        "{ .reg .b32 ra; mapa.shared::cluster.u32 ra, $4, $5; ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [ra]; }",
        _RegisterPackType[Float32, Float32, Float32, Float32],
        constraints="=f,=f,=f,=f,r,r",
        has_side_effect=True,
    ](address, Int32(rank))
    return SIMD[F32, 4](r[0], r[1], r[2], r[3])


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](WARPS * 32))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(3))
def _decode_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, tiles_per_block: Int
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
    comptime K_VECS = head_dim // 32  # a quad covers 32 dims of a key at a time
    comptime V_VECS = head_dim // 64  # the 8 lanes of a column cover 64 dims of a value at a time
    comptime O_TILES = head_dim // 16
    comptime ROW_VECS = head_dim // 4
    comptime FACTOR = scale * LOG2E
    var group = num_q_heads // num_kv_heads
    var head_tiles = ceildiv(group, Int32(HEADS))
    var kv_head = Int32(block_idx.y) // head_tiles
    var first_head = Int32(block_idx.y) % head_tiles * Int32(HEADS)
    var heads = min(HEADS, Int(group - first_head))
    var request = block_idx.z
    var token = query_starts[unsafe_offset=request]
    if query_starts[unsafe_offset=request + 1] - token != 1:
        return  # not a decode request: the prefill kernel's, or padding
    var seq_len = seq_lens[unsafe_offset=request]
    var last_key = seq_len - 1
    var num_blocks = _num_blocks[tiles_per_block](Int(seq_len))
    var rank = block_idx.x
    if rank >= num_blocks:
        return
    var tid = thread_idx.x
    var warp_index = warp_id()
    var lane = lane_id()
    var row = lane // 4  # head of the scores, key of K, dim of V
    var col = lane % 4
    var pages = page_table.unsafe_offset(request * Int(page_table_width)).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var keys = k_layer.unsafe_offset(col * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var values = v_layer.unsafe_offset(row * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var first_row = Int(token * num_q_heads + kv_head * group + first_head) * head_dim
    var query = q.unsafe_offset(first_row)

    var q_frag = Array[SIMD[dtype, 8], 2 * K_VECS](fill=0)
    if row < heads:
        comptime for i in range(K_VECS):
            var v = query.unsafe_load[width=VEC, alignment=16](row * head_dim + i * 32 + col * VEC)
            q_frag[2 * i] = SIMD[dtype, 8](v[0], v[1], 0, 0, v[2], v[3], 0, 0)
            q_frag[2 * i + 1] = SIMD[dtype, 8](v[4], v[5], 0, 0, v[6], v[7], 0, 0)

    @always_inline
    def page_base(key: Int32) {imm} -> Int:
        """Elements from the start of the layer to the page of a key."""
        var page = pages[unsafe_offset=Int(min(key, last_key) >> Int32(log2_floor(page_size)))]
        return Int(page * num_kv_heads + kv_head) * (page_size * head_dim)

    @always_inline
    def offset_of(key: Int32, chunk_base: Int) {imm} -> Int:
        """Elements from the start of the layer to a key of the chunk, whose page is known if pages hold whole chunks."""
        var base = chunk_base
        comptime if page_size < CHUNK:
            base = page_base(key)
        return base + Int((min(key, last_key) & Int32(page_size - 1)) * Int32(head_dim))

    @always_inline
    def load_keys(mut frag: Array[SIMD[dtype, VEC], 2 * K_VECS], key: Int32, base: Int) {imm}:
        comptime for t in range(2):
            var at = offset_of(key + Int32(t * 8 + row), base)
            comptime for i in range(K_VECS):
                frag[t * K_VECS + i] = keys.unsafe_load[width=VEC, alignment=16](at + i * 32)

    var k_frag = Array[SIMD[dtype, VEC], 2 * K_VECS](fill=0)
    var v_frag = Array[SIMD[dtype, VEC], 4 * V_VECS](fill=0)
    var o = Array[SIMD[F32, 4], O_TILES](fill=0)
    var m = Float32.MIN_FINITE
    var l = Float32(0)
    var step = Int32(num_blocks * TILE)
    var key = Int32(rank * TILE + warp_index * CHUNK)
    var base = page_base(key) if key < seq_len else 0
    if key < seq_len:
        load_keys(k_frag, key, base)
    while key < seq_len:
        comptime for r in range(4):
            var at = offset_of(key + Int32(col * 2 + (r // 2) * 8 + r % 2), base)
            comptime for c in range(V_VECS):
                v_frag[r * V_VECS + c] = values.unsafe_load[width=VEC, alignment=16](at + c * 64)
        var next = key + step
        var next_base = page_base(next)

        # This lane gets, of head `row`, the scores of keys 2 col, 2 col + 1, 2 col + 8 and 2 col + 9 of the chunk.
        var s = Array[SIMD[F32, 4], 2](fill=0)
        comptime for t in range(2):
            comptime for i in range(K_VECS):
                var k = k_frag[t * K_VECS + i]
                mma(s[t], q_frag[2 * i], k.slice[4, offset=0](), s[t])
                mma(s[t], q_frag[2 * i + 1], k.slice[4, offset=4](), s[t])
        if next < seq_len:
            load_keys(k_frag, next, next_base)

        var scores = SIMD[F32, 4](s[0][0], s[0][1], s[1][0], s[1][1]) * FACTOR
        var at = SIMD[DType.int32, 4](0, 1, 8, 9) + (key + Int32(col * 2))
        scores = at.lt(seq_len).select(scores, SIMD[F32, 4](Float32.MIN_FINITE))
        var m_new = max(m, _quad_max(scores.reduce_max()))
        var fade = _exp2(m - m_new)
        m = m_new
        var p = SIMD[F32, 4](0)
        comptime for i in range(4):
            p[i] = _exp2(scores[i] - m)
        l = l * fade + p.reduce_add()
        var p_frag = p.cast[dtype]()
        # o^T has its heads in columns: this lane's are 2 col and 2 col + 1.
        var fade_0 = warp.shuffle_idx(fade, UInt32(8 * col))
        var fade_1 = warp.shuffle_idx(fade, UInt32(8 * col + 4))
        comptime for j in range(O_TILES):
            # Rows `row` and `row` + 8 of v^T: element j of two vectors if the head dimension has two, else two elements of one.
            comptime e = j if V_VECS == 2 else 2 * j
            comptime f = j if V_VECS == 2 else 2 * j + 1
            comptime c = V_VECS - 1
            var a = SIMD[dtype, 8](
                v_frag[0][e],
                v_frag[V_VECS][e],
                v_frag[c][f],
                v_frag[V_VECS + c][f],
                v_frag[2 * V_VECS][e],
                v_frag[3 * V_VECS][e],
                v_frag[2 * V_VECS + c][f],
                v_frag[3 * V_VECS + c][f],
            )
            o[j] *= SIMD[F32, 4](fade_0, fade_1, fade_0, fade_1)
            mma(o[j], a, p_frag, o[j])
        key = next
        base = next_base

    # Merge the warps. This lane has heads 2 col and 2 col + 1 of the dims from 8 row on (and 64 + 8 row on).
    var part_m = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
    var part_l = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
    var part_o = unsafe_stack_allocation[WARPS * HEADS * head_dim, Float32, alignment=16, address_space=AddressSpace.SHARED]()
    var block_ml = unsafe_stack_allocation[HEADS * 4, Float32, alignment=16, address_space=AddressSpace.SHARED]()
    l = _quad_sum(l)
    if row < heads:
        if col == 0:
            part_m[unsafe_offset=warp_index * HEADS + row] = m
            part_l[unsafe_offset=warp_index * HEADS + row] = l
    comptime for h in range(2):
        if 2 * col + h < heads:
            comptime for c in range(V_VECS):
                var dims = SIMD[F32, VEC](0)
                comptime for j in range(VEC):
                    comptime if V_VECS == 2:
                        dims[j] = o[j][2 * c + h]
                    else:
                        dims[j] = o[j // 2][j % 2 * 2 + h]
                var to = (warp_index * HEADS + 2 * col + h) * head_dim + row * VEC + c * 64
                part_o.unsafe_store[alignment=16](to, dims.slice[4, offset=0]())
                part_o.unsafe_store[alignment=16](to + 4, dims.slice[4, offset=4]())
    barrier()
    var target = output.unsafe_offset(first_row)
    for i in range(tid, heads * ROW_VECS, WARPS * WARP_SIZE):
        var head = i // ROW_VECS
        var top = Float32.MIN_FINITE
        comptime for w in range(WARPS):
            top = max(top, part_m[unsafe_offset=w * HEADS + head])
        var sum = Float32(0)
        var acc = SIMD[F32, 4](0)
        comptime for w in range(WARPS):
            var weight = _exp2(part_m[unsafe_offset=w * HEADS + head] - top)
            sum += weight * part_l[unsafe_offset=w * HEADS + head]
            acc += weight * part_o.unsafe_load[width=4, alignment=16](w * HEADS * head_dim + i * 4)
        if num_blocks == 1:
            target.unsafe_store[alignment=8](i * 4, (acc * _inverse(sum)).cast[dtype]())
        else:
            part_o.unsafe_store[alignment=16](i * 4, acc)
            if i % ROW_VECS == 0:
                block_ml.unsafe_store[alignment=16](head * 4, SIMD[F32, 4](top, sum, 0, 0))
    if num_blocks == 1:
        return

    # Merge the blocks: each takes a share of the outputs and sums them over all blocks in rank order.
    cluster_sync()
    for i in range(rank * WARPS * WARP_SIZE + tid, heads * ROW_VECS, num_blocks * WARPS * WARP_SIZE):
        var head = i // ROW_VECS
        var ml = Array[SIMD[F32, 4], MAX_BLOCKS](fill=0)
        var part = Array[SIMD[F32, 4], MAX_BLOCKS](fill=0)
        comptime for r in range(MAX_BLOCKS):  # all loads in flight at once; ranks not in use repeat the last with weight 0
            var peer = min(r, num_blocks - 1)
            ml[r] = _load_peer(Int32(Int(block_ml.unsafe_offset(head * 4))), peer)
            part[r] = _load_peer(Int32(Int(part_o.unsafe_offset(i * 4))), peer)
        var top = ml[0][0]
        comptime for r in range(1, MAX_BLOCKS):
            top = max(top, ml[r][0])
        var sum = Float32(0)
        var acc = SIMD[F32, 4](0)
        comptime for r in range(MAX_BLOCKS):
            var weight = _exp2(ml[r][0] - top) if r < num_blocks else Float32(0)
            sum += weight * ml[r][1]
            acc += weight * part[r]
        target.unsafe_store[alignment=8](i * 4, (acc * _inverse(sum)).cast[dtype]())
    cluster_sync()  # a block's shared memory must outlive its readers


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
    comptime kernel = _decode_kernel[dtype, head_dim, page_size, scale, tiles_per_block]
    var cluster = 1  # a power of two that the longest request fits; more would only add blocks that return at once
    while cluster < _num_blocks[tiles_per_block](max_seq_len):
        cluster *= 2
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
        grid_dim=(cluster, num_kv_heads * ceildiv(num_q_heads // num_kv_heads, HEADS), num_requests),
        block_dim=WARPS * WARP_SIZE,
        cluster_dim=Dim(cluster, 1, 1),
    )
