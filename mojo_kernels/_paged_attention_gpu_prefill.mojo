"""Prefill: causal attention of requests with several query tokens over a paged KV cache, bound by the tensor cores.

FlashAttention on Hopper's wgmma. A block of two warpgroups owns 128 query rows of one request and KV head, 64 each; a row is one
(token, query head) pair, the heads that share the KV head side by side, so that they share its K and V tiles too. Tiles of 64 keys
come by cp.async, page by page, into the 128-byte-swizzled halves (64 dims wide) that wgmma reads: K as its K-major and V as its
MN-major right operand. The next tile is under way while one is used; the second block of a multiprocessor fills the waits for
softmax. Scores and outputs stay in registers, and the scores of one product are, in place, the left operand of the next.

Tiles start at multiples of 64 keys and a tile that is masked for a row leaves it unchanged bit for bit, so that a row does not depend
on the batch nor on how its prompt was cut into chunks. Keys past the end of the request are read at its last slot instead, and
masked as all keys after the row's own position are.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _exp2, _inverse, _quad_max, _quad_sum
from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, grid_dim, syncwarp
from max.gpu.compute.mma import (
    WGMMADescriptor,
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.host import FuncAttribute
from max.gpu.host.nvidia.tma import TensorMapSwizzle
from max.gpu.memory import (
    async_copy,
    async_copy_commit_group,
    async_copy_wait_group,
    external_memory,
    fence_async_view_proxy,
)
from std.bit import log2_floor
from std.sys import inlined_assembly
from std.utils.static_tuple import StaticTuple

comptime GROUPS = 2  # warpgroups
comptime THREADS = GROUPS * 128
comptime ROWS = GROUPS * 64
comptime TILE = 64  # keys
comptime HALF = 64  # dims of one swizzled half: rows of 128 bytes
comptime HALF_SIZE = 64 * HALF
comptime SW = TensorMapSwizzle.SWIZZLE_128B


@always_inline
def _pin[width: SIMDLength](mut x: SIMD[F32, width]):
    """Ties accumulators to this point of the program: wgmma writes them behind the compiler's back."""
    comptime for i in range(Int(width)):
        x[i] = inlined_assembly["", Float32, constraints="=f,0", has_side_effect=True](x[i])


@always_inline
def _pack[dtype: DType, width: SIMDLength](x: SIMD[F32, width]) -> Array[SIMD[dtype, 8], Int(width) // 8]:
    """Rounds scores to operands of wgmma, all of them before the first is used."""
    var packed = Array[SIMD[dtype, 8], Int(width) // 8](fill=0)
    comptime for i in range(Int(width) // 8):
        var words = bitcast[DType.uint32, 4](x.slice[8, offset=i * 8]().cast[dtype]())
        comptime for j in range(4):
            words[j] = inlined_assembly["", UInt32, constraints="=r,0", has_side_effect=True](words[j])
        packed[i] = bitcast[dtype, 8](words)
    return packed^


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))
@__llvm_metadata(`nvvm.minctasm`=SIMDLength(min_blocks))
def _prefill_kernel[
    dtype: DType, head_dim: Int, page_size: Int, scale: Float32, min_blocks: Int
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
    """Grid (KV heads, tiles of 128 rows)."""
    comptime ROW_VECS = head_dim // VEC
    comptime COPY_ROWS = THREADS // ROW_VECS  # rows that one cp.async of the block covers; a multiple of 8
    comptime HALVES = head_dim // HALF
    comptime TILE_SIZE = TILE * head_dim
    comptime S_WIDTH = TILE // 2  # registers of a thread for 64 rows
    comptime O_WIDTH = head_dim // 2
    comptime FACTOR = scale * LOG2E
    launch_dependent_grids()
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
    wait_on_dependent_grids()
    if num_rows <= group or first_row >= num_rows:
        return  # a decode request, or one tile too many
    var seq_len = Int(seq_lens[unsafe_offset=request])
    var first_position = seq_len - num_rows // group  # of the request's first row
    var last_key = Int32(seq_len - 1)

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

    var last_row = min(ROWS, num_rows - first_row) - 1
    var num_tiles = (first_position + token_of(last_row)) // TILE + 1
    var tid = thread_idx.x
    var lane = lane_id()
    var warp_row = warp_id() * 16
    var pages = page_table.unsafe_offset(request * Int(page_table_width)).unsafe_address_space_cast[
        AddressSpace.GLOBAL
    ]()
    # Each of q, K and V: [64-row group][half][64 rows][64 dims], 16-byte vector c of row r kept at c ^ (r mod 8).
    var sq = external_memory[Scalar[dtype], address_space=AddressSpace.SHARED, alignment=1024]()
    var skv = sq.unsafe_offset(ROWS * head_dim)  # two stages of (K, V)
    var copy_row = tid // ROW_VECS
    var copy_vec = tid % ROW_VECS
    var copy_to = copy_vec // 8 * HALF_SIZE + copy_row * HALF + ((copy_vec % 8) ^ (copy_row % 8)) * VEC

    @always_inline
    def fetch_tile(first_key: Int, stage: Int) {imm}:
        var keys = k_layer.unsafe_offset(copy_vec * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
        var values = v_layer.unsafe_offset(copy_vec * VEC).unsafe_address_space_cast[AddressSpace.GLOBAL]()
        var to = skv.unsafe_offset(stage * 2 * TILE_SIZE + copy_to)
        comptime for i in range(TILE // COPY_ROWS):
            var key = min(Int32(first_key + copy_row + i * COPY_ROWS), last_key)
            var page = pages[unsafe_offset=Int(key >> Int32(log2_floor(page_size)))]
            var at = Int(page * num_kv_heads + kv_head) * (page_size * head_dim)
            at += Int((key & Int32(page_size - 1)) * Int32(head_dim))
            async_copy[16](keys.unsafe_offset(at), to.unsafe_offset(i * COPY_ROWS * HALF))
            async_copy[16](values.unsafe_offset(at), to.unsafe_offset(TILE_SIZE + i * COPY_ROWS * HALF))
        async_copy_commit_group()

    comptime for i in range(ROWS // COPY_ROWS):
        comptime row = i * COPY_ROWS
        var at = row_offset(min(copy_row + row, last_row)) + copy_vec * VEC
        var query = q.unsafe_offset(at).unsafe_address_space_cast[AddressSpace.GLOBAL]()
        async_copy[16](query, sq.unsafe_offset(copy_to + row // 64 * 64 * head_dim + row % 64 * HALF))
    fetch_tile(0, 0)

    # wgmma's strides in 16-byte units: 8 rows of a half are 1024 bytes, a half is 8192 bytes.
    var group_q = sq.unsafe_offset(warp_id() // 4 * 64 * head_dim)
    # A lane has rows lane / 4 and lane / 4 + 8 of its warp's 16: index h.
    var position = Array[Int32, 2](fill=0)
    var m = Array[Float32, 2](fill=Float32.MIN_FINITE)
    var l = Array[Float32, 2](fill=0)
    var s = SIMD[F32, S_WIDTH](0)
    var o = SIMD[F32, O_WIDTH](0)
    comptime for h in range(2):
        position[h] = Int32(first_position + token_of(warp_row + h * 8 + lane // 4))

    for t in range(num_tiles):
        async_copy_wait_group(0)
        fence_async_view_proxy()
        barrier()  # this tile is here, and every warp is done with the one before
        var tile_k = skv.unsafe_offset(t % 2 * 2 * TILE_SIZE)
        var a = WGMMADescriptor[dtype].create[64, 1, SW](group_q)
        var b = WGMMADescriptor[dtype].create[64, 1, SW](tile_k)
        _pin(s)
        wgmma_fence_aligned()
        comptime for k in range(head_dim // 16):
            comptime at = (k // 4 * HALF_SIZE + k % 4 * 16) * 2
            s = wgmma_async[64, TILE, 16, a_type=dtype, b_type=dtype, scale_d=0 if k == 0 else 1](a + at, b + at, s)
        wgmma_commit_group_sync()
        if t + 1 < num_tiles:
            fetch_tile((t + 1) * TILE, (t + 1) % 2)
        wgmma_wait_group_sync()
        _pin(s)

        if t * TILE + TILE - 1 > first_position + token_of(warp_row):  # some row of the warp ends inside this tile
            comptime for n in range(TILE // 8):
                comptime for e in range(2):
                    var key = Int32(t * TILE + n * 8 + lane % 4 * 2 + e)
                    comptime for h in range(2):
                        s[n * 4 + h * 2 + e] = Float32.MIN_FINITE if key > position[h] else s[n * 4 + h * 2 + e]
        comptime for h in range(2):
            var top = m[h]
            comptime for n in range(TILE // 8):
                top = max(top, max(s[n * 4 + h * 2], s[n * 4 + h * 2 + 1]))
            top = _quad_max(top)
            var fade = _exp2((m[h] - top) * FACTOR)
            m[h] = top
            var shift = top * FACTOR
            var sum = l[h] * fade
            comptime for n in range(TILE // 8):
                comptime for e in range(2):
                    var p = _exp2(s[n * 4 + h * 2 + e].fma(FACTOR, -shift))
                    s[n * 4 + h * 2 + e] = p
                    sum += p
            l[h] = sum
            comptime for n in range(head_dim // 8):
                o[n * 4 + h * 2] *= fade
                o[n * 4 + h * 2 + 1] *= fade

        var v = WGMMADescriptor[dtype].create[64, HALF_SIZE * 2 // 16, SW](tile_k.unsafe_offset(TILE_SIZE))
        var p = _pack[dtype](s)
        _pin(o)
        wgmma_fence_aligned()
        comptime for k in range(TILE // 16):
            o = wgmma_async[64, head_dim, 16, a_type=dtype, b_type=dtype, layout_b="row"](
                p[k], v + k * 16 * HALF * 2, o
            )
        wgmma_commit_group_sync()
        wgmma_wait_group_sync()
        _pin(o)

    # q is not needed any more: each warp turns its outputs into whole rows in its own rows of it.
    barrier()
    comptime for h in range(2):
        var factor = _inverse(_quad_sum(l[h]))
        var row = warp_row % 64 + h * 8 + lane // 4
        comptime for n in range(head_dim // 8):
            var pair = SIMD[F32, 2](o[n * 4 + h * 2], o[n * 4 + h * 2 + 1]) * factor
            var at = n // 8 * HALF_SIZE + row * HALF + ((n % 8) ^ (row % 8)) * VEC + lane % 4 * 2
            group_q.unsafe_store[alignment=4](at, pair.cast[dtype]())
    syncwarp()
    comptime WARP_ROWS = WARP_SIZE // ROW_VECS
    comptime for i in range(16 // WARP_ROWS):
        var row = warp_row + lane // ROW_VECS + i * WARP_ROWS
        var c = lane % ROW_VECS
        if row <= last_row:
            var at = c // 8 * HALF_SIZE + row % 64 * HALF + ((c % 8) ^ (row % 8)) * VEC
            output.unsafe_store[alignment=16](
                row_offset(row) + c * VEC, group_q.unsafe_load[width=VEC, alignment=16](at)
            )


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
    comptime SHARED_BYTES = (ROWS + 4 * TILE) * head_dim * size_of[dtype]()
    var group = num_q_heads // num_kv_heads
    var tiles = num_tokens * group // ROWS + num_requests

    @always_inline
    def launch[min_blocks: Int]() raises {imm}:
        comptime kernel = _prefill_kernel[dtype, head_dim, page_size, scale, min_blocks]
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
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    # A block that has a multiprocessor for itself is faster with all its registers; many blocks, two by two.
    if num_kv_heads * tiles <= ctx.default_device_info.sm_count:
        launch[1]()
    else:
        launch[2]()
