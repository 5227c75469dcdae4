"""How the decode kernel adds up: for each warp of a block the parts of a request in order, then the warps.

In a lone block a warp adds its parts as they come, in registers, and the warps meet once, at the end. In a cluster each warp sends
its sum of a part, a share of the dims to every block, into that block's inbox; an mbarrier there counts the bytes, and when all are
in, the block adds up its share. Both ways add the same numbers in the same order. Knows shared memory and sums; no keys, pages or
queries.
"""

from ._paged_attention_gpu_decode_parts import HEADS, PARTS, THREADS, WARPS, _at_heads, _tile_of
from ._paged_attention_gpu_math import _exp2, _inverse, _push, _push_pair, _quad_max, _quad_sum
from ._prelude import *
from layout.tma_async import SharedMemBarrier
from max.gpu import syncwarp
from max.gpu.memory import fence_mbarrier_init
from max.gpu.primitives.cluster import cluster_arrive_relaxed
from std.bit import log2_floor


struct _Sums[head_dim: Int, split: Bool]:
    """A warp's sums over the parts so far, as the product p v leaves them, and the room in which warps and blocks meet."""

    comptime HEAD_VECS = Self.head_dim // 4
    comptime O_TILES = Self.head_dim // 16
    comptime LD = Self.head_dim + 4  # padded: the stores of a warp fall into different banks
    comptime Rows = Array[SIMD[F32, 4], Self.O_TILES]
    comptime Floats = MutPointer[Float32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]
    comptime Barrier = MutPointer[SharedMemBarrier, MutUntrackedOrigin, address_space=AddressSpace.SHARED]

    var heads: Int
    var warp: Int  # the calling warp's number
    var rows: Self.Floats  # [warp, head, LD]
    var rows_ml: Self.Floats  # m and l of [warp, head]
    var total: Self.Rows
    var total_m: Float32
    var total_l: Float32
    var log_share: Int32
    var share: Int  # vectors of 4 dims that a block of the cluster adds up
    var inbox: Self.Floats  # [part, warp, head, its share of the dims]
    var inbox_ml: Self.Floats  # m and l of [part, warp, head]
    var landed: Self.Barrier  # counts the bytes that come in

    @always_inline
    def __init__(out self, memory: Self.Floats, warp_index: Int, heads: Int, log_blocks: Int32):
        """`memory` is shared, with room for the sums of all warps and, in a cluster, the inbox."""
        self.heads = heads
        self.warp = warp_index
        self.rows = memory
        self.rows_ml = unsafe_stack_allocation[WARPS * HEADS * 2, Float32, alignment=16, address_space=AddressSpace.SHARED]()
        self.total = Self.Rows(fill=0)
        self.total_m = Float32.MIN_FINITE
        self.total_l = 0
        self.log_share = Int32(log2_floor(Self.HEAD_VECS)) - log_blocks
        self.share = Int(Int32(1) << self.log_share)
        self.inbox = memory.unsafe_offset(WARPS * heads * Self.LD)
        self.inbox_ml = unsafe_stack_allocation[
            PARTS * WARPS * HEADS * 2 if Self.split else 2, Float32, alignment=16, address_space=AddressSpace.SHARED
        ]()
        self.landed = unsafe_stack_allocation[1, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()

    @always_inline
    def expect(self, tiles: Int32):
        """Readies the inbox for the parts that have tiles, then says to the cluster that this block runs; all threads call it."""
        if thread_idx.x == 0:
            self.landed[].init(1)
            fence_mbarrier_init()
            var sent = self.heads * (self.share * 16 + 8) * WARPS
            self.landed[].expect_bytes(min(tiles, Int32(PARTS)) * Int32(sent))
        cluster_arrive_relaxed()

    @always_inline
    def _put(self, o: Self.Rows):
        """Writes the warp's sums as rows: this lane has dims lane / 4 and lane / 4 + 8 of each 16, heads 2 c and 2 c + 1."""
        comptime for h in range(2):
            var head = lane_id() % 4 * 2 + h
            if head < self.heads:
                var to = (self.warp * self.heads + head) * Self.LD + lane_id() // 4
                comptime for i in range(Self.O_TILES):
                    self.rows[unsafe_offset=to + i * 16] = o[i][h]
                    self.rows[unsafe_offset=to + i * 16 + 8] = o[i][h + 2]

    @always_inline
    def add_part(mut self, part: Int32, o: Self.Rows, m: Float32, var l: Float32, num_blocks: Int32):
        """Adds the warp's sums of a part to those of the parts before, or sends them to the blocks that own them."""
        var lane = lane_id()
        l = _quad_sum(l)
        comptime if not Self.split:
            var fade, gain = _weights(self.total_m, m)
            self.total_l = self.total_l.fma(fade, l * gain)
            var fades = _at_heads(fade)
            var gains = _at_heads(gain)
            comptime for i in range(Self.O_TILES):
                self.total[i] = self.total[i].fma(fades, o[i] * gains)
        else:
            var landed = Int32(Int(self.landed))
            syncwarp()  # all lanes have read the part before
            self._put(o)
            var box = (Int(part) * WARPS + self.warp) * self.heads
            if lane // 4 < self.heads:
                var to = Int32(Int(self.inbox_ml.unsafe_offset((box + lane // 4) * 2)))
                comptime for i in range(PARTS // 4):
                    if Int32(lane % 4 + i * 4) < num_blocks:
                        _push_pair(to, landed, Int32(lane % 4 + i * 4), m, l)
            syncwarp()
            for i in range(lane, self.heads * Self.HEAD_VECS, WARP_SIZE):
                var head = i // Self.HEAD_VECS
                var column = i % Self.HEAD_VECS
                var at = (self.warp * self.heads + head) * Self.LD + column * 4
                var to = ((box + head) * self.share + (column & (self.share - 1))) * 4
                var values = self.rows.unsafe_load[width=4, alignment=16](at)
                _push(Int32(Int(self.inbox.unsafe_offset(to))), landed, Int32(column) >> self.log_share, values)

    @always_inline
    def store[dtype: DType](mut self, output: Ptr[dtype], first_row: Int, rank: Int32, tiles: Int32):
        """Adds up the warps and writes the heads' rows [heads, head_dim], in a cluster a share of each, from `first_row` on."""
        comptime if Self.split:
            self.landed[].wait(0)
        else:
            self._put(self.total)
            if lane_id() % 4 == 0:
                var to = (self.warp * HEADS + lane_id() // 4) * 2
                self.rows_ml.unsafe_store[alignment=8](to, SIMD[F32, 2](self.total_m, self.total_l))
            barrier()
        # Four neighbouring lanes have the same 4 dims of a head, each those of one warp.
        var log_share = self.log_share if Self.split else Int32(log2_floor(Self.HEAD_VECS))
        var count = Int32(self.heads * WARPS) << log_share
        var i = Int32(thread_idx.x)
        var w = lane_id() % WARPS
        while i - Int32(lane_id()) < count:
            var vector = min(i, count - 1) // Int32(WARPS)
            var head = Int(vector >> log_share)
            var column = Int(vector & ((Int32(1) << log_share) - 1))
            var acc = SIMD[F32, 4](0)
            var m = Float32.MIN_FINITE
            var l = Float32(0)
            comptime if Self.split:
                # --8<-- [start:merge]
                comptime for part in range(PARTS):
                    var box = (part * WARPS + w) * self.heads + head
                    var ml = self.inbox_ml.unsafe_load[width=2, alignment=8](box * 2)
                    var x = self.inbox.unsafe_load[width=4, alignment=16](((box << Int(log_share)) + column) * 4)
                    if _tile_of(Int32(part), tiles) == _tile_of(Int32(part + 1), tiles):  # nobody has sent any
                        ml = SIMD[F32, 2](Float32.MIN_FINITE, 0)
                        x = -0.0  # what changes no sum
                    var fade, gain = _weights(m, ml[0])
                    l = l.fma(fade, ml[1] * gain)
                    acc = acc.fma(SIMD[F32, 4](fade), x * gain)
                # --8<-- [end:merge]
            else:
                var ml = self.rows_ml.unsafe_load[width=2, alignment=8]((w * HEADS + head) * 2)
                m = ml[0]
                l = ml[1]
                acc = self.rows.unsafe_load[width=4, alignment=16]((w * self.heads + head) * Self.LD + column * 4)
            var weight = _exp2(m - _quad_max(m))
            var scale = _inverse(_quad_sum(l * weight))
            comptime for e in range(4):
                acc[e] = _quad_sum(acc[e] * weight) * scale
            if w == 0 and i < count:
                var to = first_row + head * Self.head_dim + column * 4
                comptime if Self.split:
                    to += Int(rank << log_share) * 4
                output.unsafe_store[alignment=8](to, acc.cast[dtype]())
            i += Int32(THREADS)


@always_inline
def _weights(mut m: Float32, part_m: Float32) -> Tuple[Float32, Float32]:
    """What to multiply the sums so far and a further part's with, so that both are relative to the greater maximum, the new `m`."""
    var top = max(m, part_m)
    var fade = _exp2(m - top)
    m = top
    return fade, _exp2(part_m - top)
