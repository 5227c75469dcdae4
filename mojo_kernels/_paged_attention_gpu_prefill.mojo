"""Prefill: causal attention of requests with several query tokens over a paged KV cache, bound by the tensor cores.

FlashAttention-2 with mma.sync m16n8k16. A block of 4 warps owns 128 query rows of one request and KV head; a row is one (token, query
head) pair, the heads that share the KV head side by side, so that they share its K and V tiles too. Tiles of 64 keys pass through
shared memory by cp.async: V arrives while the scores are computed, the next K while V is used. A warp owns 32 rows: their scores and
outputs stay in registers, and the scores of one mma are, in place, the left operand of the next.

Tiles start at multiples of 64 keys and a tile that is masked for a row leaves it unchanged bit for bit, so that a row does not depend
on the batch nor on how its prompt was cut into chunks. Keys past the end of the request are read at its last slot instead, and
masked as all keys after the row's own position are.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _exp2, _inverse, _quad_max, _quad_sum
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, grid_dim, syncwarp
from max.gpu.compute.mma import ld_matrix, mma
from max.gpu.host import FuncAttribute
from max.gpu.memory import async_copy, async_copy_commit_group, async_copy_wait_group, external_memory
from std.bit import log2_floor
from std.utils.static_tuple import StaticTuple

comptime WARPS = 4
comptime THREADS = WARPS * 32
comptime TILE = 64  # keys


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
def _prefill_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, M: Int
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
    num_q_heads: Int32,
    num_kv_heads: Int32,
    group_inverse: UInt64,
):
    """Grid (KV heads, tiles of 64 M rows); M is how many 16-row mma tiles a warp has."""
    comptime ROWS = WARPS * 16 * M
    comptime ROW_VECS = head_dim // VEC
    comptime LD = head_dim + VEC  # padded: the 8 rows of an ldmatrix fall into different banks
    comptime S_TILES = TILE // 8
    comptime O_TILES = head_dim // 8
    comptime FACTOR = scale * LOG2E
    var group = Int(num_q_heads) // Int(num_kv_heads)
    var kv_head = Int32(block_idx.x)
    var tile = grid_dim.y - 1 - block_idx.y  # late tiles of a prompt have the most keys: start them first

    # Request r owns tiles from query_starts[r] group / ROWS + r on: enough for all its rows, and found without a prefix sum.
    var before = Int32(0)
    for r in range(lane_id(), Int(num_requests), WARP_SIZE):
        before += Int32(Int(query_starts[unsafe_offset=r]) * group // ROWS + r <= tile)
    var request = Int(warp.sum(before)) - 1
    var first_token = Int(query_starts[unsafe_offset=request])
    var num_rows = (Int(query_starts[unsafe_offset=request + 1]) - first_token) * group
    var first_row = (tile - first_token * group // ROWS - request) * ROWS
    if num_rows <= group or first_row >= num_rows:
        return  # a decode request, or one tile too many
    var seq_len = Int(seq_lens[unsafe_offset=request])
    var first_position = seq_len - num_rows // group  # of the request's first row
    var last_position = first_position + (min(first_row + ROWS, num_rows) - 1) // group
    var last_key = Int32(seq_len - 1)
    var num_tiles = last_position // TILE + 1

    @always_inline
    def token_of(row: Int) {imm} -> Int:
        """Which of the request's tokens a row of this block belongs to: a division by the group, without dividing."""
        return Int((UInt64(first_row + row) * group_inverse) >> 32)

    @always_inline
    def row_offset(row: Int) {imm} -> Int:
        """Elements from the start of q and output to a row of this block."""
        var token = token_of(row)
        var head = Int(kv_head) * group + first_row + row - token * group
        return ((first_token + token) * Int(num_q_heads) + head) * head_dim

    var tid = thread_idx.x
    var lane = lane_id()
    var warp_row = warp_id() * 16 * M
    var pages = page_table.unsafe_offset(request * Int(page_table_width)).unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var query = q.unsafe_address_space_cast[AddressSpace.GLOBAL]()
    var sq = external_memory[Scalar[dtype], address_space=AddressSpace.SHARED, alignment=16]()
    var sk = sq.unsafe_offset(ROWS * LD)
    var sv = sk.unsafe_offset(TILE * LD)

    # Where this thread copies to, and what this lane gives ldmatrix: the rest of every address is a constant.
    var copy_row = tid // ROW_VECS
    var copy_column = tid % ROW_VECS * VEC
    var copy_to = copy_row * LD + copy_column
    var q_lane = sq.unsafe_offset((warp_row + lane % 16) * LD + lane // 16 * 8)
    var k_lane = sk.unsafe_offset((lane // 16 * 8 + lane % 8) * LD + lane // 8 % 2 * 8)
    var v_lane = sv.unsafe_offset((lane % 16) * LD + lane // 16 * 8)

    @always_inline
    def fetch_tile(layer: Ptr[dtype], shared: type_of(sq), first_key: Int32) {imm}:
        var source = layer.unsafe_offset(copy_column).unsafe_address_space_cast[AddressSpace.GLOBAL]()
        comptime for i in range(TILE * ROW_VECS // THREADS):
            comptime row = i * (THREADS // ROW_VECS)
            var key = min(first_key + Int32(copy_row + row), last_key)
            var page = pages[unsafe_offset=Int(key >> Int32(log2_floor(page_size)))]
            var at = Int(page * num_kv_heads + kv_head) * (page_size * head_dim)
            at += Int((key & Int32(page_size - 1)) * Int32(head_dim))
            async_copy[16](source.unsafe_offset(at), shared.unsafe_offset(copy_to + row * LD))
        async_copy_commit_group()

    comptime for i in range(ROWS * ROW_VECS // THREADS):
        comptime row = i * (THREADS // ROW_VECS)
        var at = row_offset(min(copy_row + row, num_rows - 1 - first_row)) + copy_column
        async_copy[16](query.unsafe_offset(at), sq.unsafe_offset(copy_to + row * LD))
    fetch_tile(k_layer, sk, 0)

    # A lane has rows lane / 4 and lane / 4 + 8 of each 16-row tile: index 2 i + h.
    var position = Array[Int32, 2 * M](fill=0)
    var m = Array[Float32, 2 * M](fill=Float32.MIN_FINITE)
    var l = Array[Float32, 2 * M](fill=0)
    var o = Array[SIMD[F32, 4], M * O_TILES](fill=0)
    comptime for i in range(2 * M):
        position[i] = Int32(first_position + token_of(warp_row + (i // 2) * 16 + (i % 2) * 8 + lane // 4))

    for t in range(num_tiles):
        async_copy_wait_group(0)
        barrier()  # K is here, and every warp is done with V of the tile before
        fetch_tile(v_layer, sv, Int32(t * TILE))

        var s = Array[SIMD[F32, 4], M * S_TILES](fill=0)
        comptime for k in range(0, head_dim, 16):
            var a = Array[SIMD[dtype, 8], M](fill=0)
            comptime for i in range(M):
                a[i] = ld_matrix[simd_width=8](q_lane.unsafe_offset(i * 16 * LD + k))
            comptime for n in range(0, S_TILES, 2):
                var b = ld_matrix[simd_width=8](k_lane.unsafe_offset(n * 8 * LD + k))
                comptime for i in range(M):
                    mma(s[i * S_TILES + n], a[i], b.slice[4, offset=0](), s[i * S_TILES + n])
                    mma(s[i * S_TILES + n + 1], a[i], b.slice[4, offset=4](), s[i * S_TILES + n + 1])

        if t * TILE + TILE - 1 > first_position + first_row // group:  # some row of the block ends inside this tile
            comptime for i in range(M):
                comptime for n in range(S_TILES):
                    var key = Int32(t * TILE + n * 8 + lane % 4 * 2)
                    var at = SIMD[DType.int32, 4](key, key + 1, key, key + 1)
                    var end = SIMD[DType.int32, 4](position[2 * i], position[2 * i], position[2 * i + 1], position[2 * i + 1])
                    s[i * S_TILES + n] = at.gt(end).select(SIMD[F32, 4](Float32.MIN_FINITE), s[i * S_TILES + n])

        comptime for i in range(M):
            comptime for h in range(2):
                var top = m[2 * i + h]
                comptime for n in range(S_TILES):
                    top = max(top, max(s[i * S_TILES + n][2 * h], s[i * S_TILES + n][2 * h + 1]))
                top = _quad_max(top)
                var fade = _exp2((m[2 * i + h] - top) * FACTOR)
                m[2 * i + h] = top
                var shift = top * FACTOR
                var sum = l[2 * i + h] * fade
                comptime for n in range(S_TILES):
                    comptime for e in range(2):
                        var p = _exp2(s[i * S_TILES + n][2 * h + e].fma(FACTOR, -shift))
                        s[i * S_TILES + n][2 * h + e] = p
                        sum += p
                l[2 * i + h] = sum
                comptime for n in range(O_TILES):
                    o[i * O_TILES + n][2 * h] *= fade
                    o[i * O_TILES + n][2 * h + 1] *= fade

        async_copy_wait_group(0)
        barrier()  # V is here, and every warp is done with K
        if t + 1 < num_tiles:
            fetch_tile(k_layer, sk, Int32((t + 1) * TILE))
        comptime for k in range(0, TILE, 16):
            var a = Array[SIMD[dtype, 8], M](fill=0)
            comptime for i in range(M):
                comptime n = i * S_TILES + k // 8
                a[i] = s[n].join(s[n + 1]).cast[dtype]()
            comptime for n in range(0, O_TILES, 2):
                var b = ld_matrix[simd_width=8, transpose=True](v_lane.unsafe_offset(k * LD + n * 8))
                comptime for i in range(M):
                    mma(o[i * O_TILES + n], a[i], b.slice[4, offset=0](), o[i * O_TILES + n])
                    mma(o[i * O_TILES + n + 1], a[i], b.slice[4, offset=4](), o[i * O_TILES + n + 1])

    # A warp's own rows of sq, which no other warp reads, turn its outputs into whole rows.
    comptime for i in range(M):
        comptime for h in range(2):
            var factor = _inverse(_quad_sum(l[2 * i + h]))
            comptime for n in range(O_TILES):
                var pair = SIMD[F32, 2](o[i * O_TILES + n][2 * h], o[i * O_TILES + n][2 * h + 1]) * factor
                var at = (warp_row + i * 16 + h * 8 + lane // 4) * LD + n * 8 + lane % 4 * 2
                sq.unsafe_store[alignment=4](at, pair.cast[dtype]())
    syncwarp()
    comptime for i in range(16 * M * ROW_VECS // WARP_SIZE):
        var row = warp_row + lane // ROW_VECS + i * (WARP_SIZE // ROW_VECS)
        var column = lane % ROW_VECS * VEC
        if first_row + row < num_rows:
            output.unsafe_store[alignment=16](row_offset(row) + column, sq.unsafe_load[width=VEC, alignment=16](row * LD + column))


def launch_prefill[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, M: Int = 2
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
    comptime kernel = _prefill_kernel[dtype, head_dim, page_size, scale, M]
    comptime ROWS = WARPS * 16 * M
    comptime SHARED_BYTES = (ROWS + 2 * TILE) * (head_dim + VEC) * size_of[dtype]()
    var group = num_q_heads // num_kv_heads
    var tiles = num_tokens * group // ROWS + num_requests
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
        Int32(num_q_heads),
        Int32(num_kv_heads),
        UInt64(ceildiv(1 << 32, group)),
        grid_dim=(num_kv_heads, tiles),
        block_dim=THREADS,
        shared_mem_bytes=SHARED_BYTES,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(SHARED_BYTES)),
    )
