"""Pieces of the decode kernel: its shape, and the rows of the QKV projection that a block makes ready when it is fused."""

from ._norm_rope_gpu import PAIRS, load_pairs, norm_rope
from ._paged_attention_gpu_math import VEC
from ._prelude import *
from std.bit import log2_floor

comptime WARPS = 4
comptime THREADS = WARPS * 32
comptime CHUNK = 16  # keys of one warp at a time: the k of one mma for p v
comptime TILE = WARPS * CHUNK
comptime HEADS = 8  # query heads per block: the rows of an mma that are used
comptime PARTS = 8  # of the tiles of a request; at most so many blocks, and 8 is the most that every device grants a cluster


@always_inline
def _tile_of(part: Int32, tiles: Int32) -> Int32:
    """The first tile of a part."""
    return (part * tiles) >> Int32(log2_floor(PARTS))


@always_inline
def _at_heads(x: Float32) -> SIMD[F32, 4]:
    """Of a number for head lane / 4: those that belong to the elements of a lane's four sums."""
    var first = warp.shuffle_idx(x, UInt32(lane_id() % 4 * 8))
    var second = warp.shuffle_idx(x, UInt32(lane_id() % 4 * 8 + 4))
    return SIMD[F32, 4](first, second, first, second)


struct _Projected[dtype: DType, head_dim: Int, fused: Bool](TrivialRegisterPassable):
    """A thread's part of one row: a query head of the block, or then k, then v; the threads past them repeat v.

    What it multiplies with does not depend on the kernel ahead and is loaded when the value is made.
    """

    comptime HALF = Self.head_dim // 2
    comptime LANES = Self.HALF // PAIRS
    comptime Q_LD = Self.head_dim + VEC  # padded: the 8 rows of an ldmatrix fall into different banks

    var own: Int
    var at: Int
    var row: Int  # where in the projection the row's part starts
    var weight_low: SIMD[F32, PAIRS]
    var weight_high: SIMD[F32, PAIRS]
    var c: SIMD[F32, PAIRS]
    var s: SIMD[F32, PAIRS]

    @always_inline
    def __init__(
        out self,
        heads: Int,
        position: Int32,
        q_norm: Ptr[Self.dtype],
        k_norm: Ptr[Self.dtype],
        cos_sin: Ptr[F32],
        token: Int32,
        group: Int32,
        first_head: Int32,
        kv_head: Int32,
        num_kv_heads: Int32,
    ):
        self.own = thread_idx.x // Self.LANES
        self.at = thread_idx.x % Self.LANES * PAIRS
        var column = kv_head * group + first_head + Int32(self.own)
        if self.own >= heads:
            column = num_kv_heads * group + kv_head + (num_kv_heads if self.own > heads else Int32(0))
        self.row = Int(token * num_kv_heads * (group + 2) + column) * Self.head_dim + self.at
        self.weight_low = 0
        self.weight_high = 0
        self.c = 0
        self.s = 0
        comptime if Self.fused:
            var weight = q_norm if self.own < heads else k_norm
            self.weight_low = load_pairs[Self.dtype](weight, self.at)
            self.weight_high = load_pairs[Self.dtype](weight, self.at + Self.HALF)
            self.c = load_pairs[F32](cos_sin, Int(position) * Self.head_dim + self.at)
            self.s = load_pairs[F32](cos_sin, Int(position) * Self.head_dim + self.at + Self.HALF)

    @always_inline
    def place[
        page_size: Int
    ](
        self,
        warp_index: Int,
        q_rows: MutPointer[Scalar[Self.dtype], _, address_space=AddressSpace.SHARED],
        new_kv: MutPointer[Scalar[Self.dtype], _, address_space=AddressSpace.SHARED],
        q: Ptr[Self.dtype],
        k_layer: Ptr[Self.dtype],
        v_layer: Ptr[Self.dtype],
        first_head: Int32,
        kv_head: Int32,
        num_kv_heads: Int32,
        heads: Int,
        new_slot: Int32,
        has_newest: Bool,
        eps: Float32,
    ):
        """Norms and rotates the row into shared memory: q [heads, Q_LD], and where the newest key is [k, v], also to the cache."""
        if warp_index * (WARP_SIZE // Self.LANES) < heads + 2:
            var x = q.unsafe_offset(self.row)
            var stored_low = x.unsafe_load[width=VEC, alignment=16](0)
            var stored_high = x.unsafe_load[width=VEC, alignment=16](Self.HALF)
            var low = stored_low.cast[F32]()
            var high = stored_high.cast[F32]()
            norm_rope[Self.head_dim](low, high, self.weight_low, self.weight_high, self.c, self.s, eps)
            if self.own <= heads:
                stored_low = low.cast[Self.dtype]()
                stored_high = high.cast[Self.dtype]()
            if self.own < heads:
                q_rows.unsafe_store[alignment=16](self.own * Self.Q_LD + self.at, stored_low)
                q_rows.unsafe_store[alignment=16](self.own * Self.Q_LD + self.at + Self.HALF, stored_high)
            # --8<-- [start:newest]
            elif self.own < heads + 2 and has_newest:
                var to = (self.own - heads) * Self.head_dim + self.at
                new_kv.unsafe_store[alignment=16](to, stored_low)
                new_kv.unsafe_store[alignment=16](to + Self.HALF, stored_high)
                if first_head == 0:
                    var line = (new_slot // Int32(page_size) * num_kv_heads + kv_head) * Int32(page_size)
                    line += new_slot % Int32(page_size)
                    var cache = (k_layer if self.own == heads else v_layer).unsafe_offset(Int(line) * Self.head_dim + self.at)
                    cache.unsafe_store[alignment=16](0, stored_low)
                    cache.unsafe_store[alignment=16](Self.HALF, stored_high)
            # --8<-- [end:newest]
