"""The two warpgroups of the prefill kernel that multiply: scores, softmax and outputs of 64 query rows each.

In a warpgroup the scores of a tile are under way with the outputs of the tile before, also from one item to the next, and softmax
runs while those outputs are summed; named barriers let the warpgroups take turns, so that one's softmax runs during the other's
products. Scores and outputs stay in registers, and the scores of one product are, in place, the left operand of the next.
"""

from ._paged_attention_gpu_math import LOG2E, VEC, _inverse, _quad_sum
from ._paged_attention_gpu_prefill_parts import HALF, RECORDS, ROWS, STAGES, SW, TILE
from ._paged_attention_gpu_prefill_parts import _here, _pack, _pin, _release, _Shared, _softmax
from ._prelude import *
from max.gpu import syncwarp
from max.gpu.compute.mma import (
    WGMMADescriptor,
    wgmma_async,
    wgmma_commit_group_sync,
    wgmma_fence_aligned,
    wgmma_wait_group_sync,
)
from max.gpu.sync import named_barrier, named_barrier_arrive


@always_inline
def _attend[
    dtype: DType, head_dim: Int, scale: Float32
](
    shared: _Shared[dtype, head_dim],
    lane: Int,
    output: Ptr[dtype],
    num_kv_heads: Int32,
    group: Int32,
    group_inverse: UInt32,
):
    """All items of the block, as the producers bring them."""
    comptime TILE_SIZE = TILE * head_dim
    comptime Q_SIZE = ROWS * head_dim
    comptime S_WIDTH = TILE // 2  # registers of a thread for 64 rows
    comptime O_WIDTH = head_dim // 2
    comptime FACTOR = scale * LOG2E
    comptime ROW_VECS = head_dim // VEC
    comptime OCTET = 8 * head_dim  # elements of eight keys: HALVES atoms of 8 x 64
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
        var a = WGMMADescriptor[dtype].create[64, 1, SW](shared.q.unsafe_offset(slot * Q_SIZE + wg * 64 * HALF))
        var b = WGMMADescriptor[dtype].create[OCTET * 2 // 16, 1, SW](shared.k.unsafe_offset(stage * TILE_SIZE))
        _pin(s)
        wgmma_fence_aligned()
        comptime for k in range(head_dim // 16):
            comptime at_a = (k // 4 * (ROWS * HALF) + k % 4 * 16) * 2
            comptime at_b = (k // 4 * (8 * HALF) + k % 4 * 16) * 2
            s = wgmma_async[64, TILE, 16, a_type=dtype, b_type=dtype, scale_d=0 if k == 0 else 1](
                a + at_a, b + at_b, s
            )
        wgmma_commit_group_sync()

    @always_inline
    def outputs(stage: Int) {mut o, imm}:
        var v = WGMMADescriptor[dtype].create[OCTET * 2 // 16, 8 * HALF * 2 // 16, SW](
            shared.v.unsafe_offset(stage * TILE_SIZE)
        )
        _pin(o)
        wgmma_fence_aligned()
        comptime for k in range(TILE // 16):
            o = wgmma_async[64, head_dim, 16, a_type=dtype, b_type=dtype, layout_b="row"](
                p[k], v + k * 2 * OCTET * 2, o
            )
        wgmma_commit_group_sync()

    @always_inline
    def token_of(row: Int) {imm} -> UInt32:
        """Of a row of an item: a division by the group, without dividing."""
        return UInt32(row) * group_inverse >> 16

    @always_inline
    def store(round: Int, l: Array[Float32, 2]) {imm}:
        """Each warp turns its outputs into whole rows, in shared memory of its own."""
        var mine = shared.o.unsafe_offset(warp_row * head_dim)
        var here = _here(lane)  # or the compiler would keep addresses in registers that the loop over keys needs
        var at = here // 4 * (head_dim + VEC) + here % 4 * 2
        comptime for h in range(2):
            var factor = _inverse(_quad_sum(l[h]))
            comptime for n in range(head_dim // 8):
                var pair = SIMD[F32, 2](o[n * 4 + h * 2], o[n * 4 + h * 2 + 1]) * factor
                mine.unsafe_store[alignment=4]((at ^ (n % 8 * VEC)) + n // 8 * HALF + h * 8 * head_dim, pair.cast[dtype]())
        syncwarp()
        comptime LANE_ROWS = WARP_SIZE // ROW_VECS
        var first_row = here // ROW_VECS
        var c = here % ROW_VECS
        at = first_row * head_dim + (c ^ first_row) * VEC
        var whole = Array[SIMD[dtype, VEC], 16 // LANE_ROWS](fill=0)
        comptime for i in range(16 // LANE_ROWS):
            comptime ROW = i * LANE_ROWS
            whole[i] = mine.unsafe_load[width=VEC, alignment=16]((at ^ (ROW % 8 * VEC)) + ROW * head_dim)
        syncwarp()
        var item = shared.items.unsafe_offset(round % RECORDS * 8)
        var last_row = Int(item[unsafe_offset=2])
        var first_token = Int(item[unsafe_offset=1]) * Int(num_kv_heads) + Int(item[unsafe_offset=4])
        var to = output.unsafe_offset(first_token * Int(group) * head_dim + c * VEC)
        comptime for i in range(16 // LANE_ROWS):
            var row = warp_row + first_row + i * LANE_ROWS
            if row <= last_row:
                # Row r of an item is head r % group of token r / group; between tokens are the other KV heads' queries.
                var skipped = Int32(token_of(row)) * ((num_kv_heads - 1) * group)
                to.unsafe_store[alignment=16](Int((Int32(row) + skipped) * Int32(head_dim)), whole[i])

    # Item by item and tile by tile, the next scores are under way with the last outputs: also from item to item,
    # where the outputs that the first item finds are of no one, and thrown away.
    if wg == 1:
        named_barrier_arrive[256](2)
    var before = 0
    while True:
        var slot = turn % 2
        shared.full_q[unsafe_offset=slot].wait(UInt32(turn // 2 & 1))
        var item = shared.items.unsafe_offset(turn % RECORDS * 8)
        var tiles = Int(item[unsafe_offset=0])
        if tiles == 0:
            break
        var first_position = item[unsafe_offset=3]
        var unmasked = (Int(first_position) + Int(token_of(wg * 64)) + 1) // TILE
        comptime for h in range(2):
            position[h] = first_position + Int32(token_of(warp_row + h * 8 + lane // 4))
        var before_phase = UInt32((count - 1) // STAGES & 1)
        var stage = count % STAGES
        shared.full_k[unsafe_offset=stage].wait(UInt32(count // STAGES & 1))
        named_barrier[256](Int32(2 + wg))
        scores(slot, stage)
        if turn > 0:
            shared.full_v[unsafe_offset=before].wait(before_phase)
        outputs(before)
        named_barrier_arrive[256](Int32(3 - wg))
        wgmma_wait_group_sync[1]()
        _pin(s)
        _release(shared.empty_k[unsafe_offset=stage])
        if tiles == 1:
            _release(shared.empty_q[unsafe_offset=slot])
        var sums = l.copy()
        comptime for h in range(2):
            m[h] = Float32.MIN_FINITE
            l[h] = 0
        _softmax[FACTOR](0, unmasked, position, s, m, l, fade)
        _pin(s)  # or the compiler moves the softmax behind the wait
        wgmma_wait_group_sync()
        _pin(o)
        if turn > 0:
            _release(shared.empty_v[unsafe_offset=before])
            store(turn - 1, sums)
        o = SIMD[F32, O_WIDTH](0)
        p = _pack[dtype](s)
        before = stage
        count += 1
        # --8<-- [start:consumer]
        for t in range(1, tiles):
            before_phase = UInt32((count - 1) // STAGES & 1)
            stage = count % STAGES
            shared.full_k[unsafe_offset=stage].wait(UInt32(count // STAGES & 1))
            named_barrier[256](Int32(2 + wg))
            scores(slot, stage)
            shared.full_v[unsafe_offset=before].wait(before_phase)
            outputs(before)
            named_barrier_arrive[256](Int32(3 - wg))
            wgmma_wait_group_sync[1]()
            _pin(s)
            _release(shared.empty_k[unsafe_offset=stage])
            if t == tiles - 1:
                _release(shared.empty_q[unsafe_offset=slot])
            _softmax[FACTOR](t, unmasked, position, s, m, l, fade)
            _pin(s)
            wgmma_wait_group_sync()
            _pin(o)
            _release(shared.empty_v[unsafe_offset=before])
            comptime for h in range(2):
                comptime for n in range(head_dim // 8):
                    o[n * 4 + h * 2] *= fade[h]
                    o[n * 4 + h * 2 + 1] *= fade[h]
            p = _pack[dtype](s)
            before = stage
            count += 1
        # --8<-- [end:consumer]
        turn += 1
    if turn > 0:
        shared.full_v[unsafe_offset=before].wait(UInt32((count - 1) // STAGES & 1))
        outputs(before)
        wgmma_wait_group_sync()
        _pin(o)
        store(turn - 1, l)
