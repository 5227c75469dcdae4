"""How the decode kernel adds up: the warps of a block in order, then the parts of a request in order.

In a lone block the parts are added as they come. In a cluster each block sends its sum of a part, a share of the dims to every
block, into that block's inbox, and after one cluster barrier each adds up its share. Both ways add the same numbers in the same
order. Knows shared memory and sums; no keys, pages or queries.
"""

from ._paged_attention_gpu_decode_parts import HEADS, PARTS, THREADS, WARPS
from ._paged_attention_gpu_math import _exp2, _inverse, _push, _push_pair, _quad_sum
from ._prelude import *
from max.gpu.primitives.cluster import cluster_arrive, cluster_wait
from std.bit import log2_floor


@always_inline
def _add_part(
    mut total: SIMD[F32, 4],
    mut total_m: Float32,
    mut total_l: Float32,
    part: SIMD[F32, 4],
    part_m: Float32,
    part_l: Float32,
):
    var top = max(total_m, part_m)
    var fade = _exp2(total_m - top)
    var gain = _exp2(part_m - top)
    total_m = top
    total_l = total_l.fma(fade, part_l * gain)
    total = total.fma(SIMD[F32, 4](fade), part * gain)


struct _Sums[head_dim: Int, split: Bool]:
    """The sums of a part: of each warp [warp, head, dim] with m and l; then of the block, which a thread has 4 dims of, or 8."""

    comptime HEAD_VECS = Self.head_dim // 4
    comptime THREAD_VECS = ceildiv(HEADS * Self.HEAD_VECS, THREADS)
    comptime O_TILES = Self.head_dim // 16
    comptime LD = Self.head_dim + 4  # padded: the stores of the warps fall into different banks
    comptime Floats = MutPointer[Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]

    var heads: Int
    var warp_size: Int  # floats of a warp in warp_o
    var warp_o: Self.Floats
    var warp_m: Self.Floats
    var warp_l: Self.Floats
    var total: Array[SIMD[F32, 4], Self.THREAD_VECS]
    var total_m: Array[Float32, Self.THREAD_VECS]
    var total_l: Array[Float32, Self.THREAD_VECS]
    var log_share: Int32
    var share: Int  # vectors of 4 dims that a block of the cluster adds up
    var inbox: Self.Floats  # [part, head, its share of the dims]
    var inbox_ml: Self.Floats  # m and l of [part, head]

    @always_inline
    def __init__(out self, memory: Self.Floats, heads: Int, log_blocks: Int32):
        """`memory` is shared, with room for the sums of all warps and, in a cluster, the inbox."""
        self.heads = heads
        self.warp_size = heads * Self.LD
        self.warp_o = memory
        self.warp_m = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
        self.warp_l = unsafe_stack_allocation[WARPS * HEADS, Float32, address_space=AddressSpace.SHARED]()
        self.total = Array[SIMD[F32, 4], Self.THREAD_VECS](fill=0)
        self.total_m = Array[Float32, Self.THREAD_VECS](fill=Float32.MIN_FINITE)
        self.total_l = Array[Float32, Self.THREAD_VECS](fill=0)
        self.log_share = Int32(log2_floor(Self.HEAD_VECS)) - log_blocks
        self.share = Int(Int32(1) << self.log_share)
        self.inbox = memory.unsafe_offset(WARPS * self.warp_size)
        self.inbox_ml = unsafe_stack_allocation[
            PARTS * HEADS * 2 if Self.split else 2, Float32, alignment=16, address_space=AddressSpace.SHARED
        ]()

    @always_inline
    def put_warp(
        self, warp_index: Int, lane: Int, o: Array[SIMD[F32, 4], Self.O_TILES], m: Float32, var l: Float32
    ):
        """A warp's sums of a part: this lane has dims lane / 4 and lane / 4 + 8 of each 16, heads 2 c and 2 c + 1."""
        l = _quad_sum(l)
        if lane % 4 == 0:
            self.warp_m[unsafe_offset=warp_index * HEADS + lane // 4] = m
            self.warp_l[unsafe_offset=warp_index * HEADS + lane // 4] = l
        comptime for h in range(2):
            var head = lane % 4 * 2 + h
            if head < self.heads:
                var to = warp_index * self.warp_size + head * Self.LD + lane // 4
                comptime for i in range(Self.O_TILES):
                    self.warp_o[unsafe_offset=to + i * 16] = o[i][h]
                    self.warp_o[unsafe_offset=to + i * 16 + 8] = o[i][h + 2]

    @always_inline
    def add_warps(mut self, part: Int32, is_empty: Bool, num_blocks: Int32):
        """Adds up the warps' sums of a part; then sends them to the blocks that own them, or adds them to the parts before."""
        comptime for n in range(Self.THREAD_VECS):
            var i = thread_idx.x + n * THREADS
            if i < self.heads * Self.HEAD_VECS:
                var head = i // Self.HEAD_VECS
                var column = i % Self.HEAD_VECS
                var top = Float32.MIN_FINITE
                comptime for w in range(WARPS):
                    top = max(top, self.warp_m[unsafe_offset=w * HEADS + head])
                var sum = Float32(0)
                var acc = SIMD[F32, 4](0)
                comptime for w in range(WARPS):
                    var weight = _exp2(self.warp_m[unsafe_offset=w * HEADS + head] - top)
                    sum = weight.fma(self.warp_l[unsafe_offset=w * HEADS + head], sum)
                    var at = w * self.warp_size + head * Self.LD + column * 4
                    acc = self.warp_o.unsafe_load[width=4, alignment=16](at).fma(SIMD[F32, 4](weight), acc)
                comptime if Self.split:
                    var owner = Int32(column) >> self.log_share
                    var box = Int(part) * self.heads + head
                    var to = Int32(Int(self.inbox.unsafe_offset((box * self.share + (column & (self.share - 1))) * 4)))
                    _push(to, owner, SIMD[F32, 4](-0.0) if is_empty else acc)  # -0 is what changes no sum
                    if column < Int(num_blocks):
                        _push_pair(Int32(Int(self.inbox_ml.unsafe_offset(box * 2))), Int32(column), top, sum)
                else:
                    _add_part(self.total[n], self.total_m[n], self.total_l[n], acc, top, sum)

    @always_inline
    def store[dtype: DType](mut self, output: Ptr[dtype], first_row: Int, rank: Int32):
        """Writes the heads' rows [heads, head_dim], from element `first_row` on; in a cluster after adding up what all blocks have sent."""
        comptime if not Self.split:
            comptime for n in range(Self.THREAD_VECS):
                var i = thread_idx.x + n * THREADS
                if i < self.heads * Self.HEAD_VECS:
                    var row = (self.total[n] * _inverse(self.total_l[n])).cast[dtype]()
                    output.unsafe_store[alignment=8](first_row + i * 4, row)
        else:
            cluster_arrive()
            cluster_wait()
            # --8<-- [start:merge]
            if thread_idx.x < self.heads * self.share:
                var head = Int(Int32(thread_idx.x) >> self.log_share)
                var column = thread_idx.x & (self.share - 1)
                comptime for part in range(PARTS):
                    var box = part * self.heads + head
                    var ml = self.inbox_ml.unsafe_load[width=2, alignment=8](box * 2)
                    var x = self.inbox.unsafe_load[width=4, alignment=16]((box * self.share + column) * 4)
                    _add_part(self.total[0], self.total_m[0], self.total_l[0], x, ml[0], ml[1])
                var row = (self.total[0] * _inverse(self.total_l[0])).cast[dtype]()
                var to = first_row + head * Self.head_dim + (Int(rank) * self.share + column) * 4
                output.unsafe_store[alignment=8](to, row)
            # --8<-- [end:merge]
