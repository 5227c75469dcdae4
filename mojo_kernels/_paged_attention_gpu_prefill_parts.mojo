"""Pieces of the prefill kernel: its shape, its shared memory, and the online softmax of a tile of scores."""

from ._paged_attention_gpu_math import _exp2, _quad_max
from ._prelude import *
from layout.coord import coord
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu.host.nvidia.tma import TensorMapSwizzle
from max.gpu.memory import external_memory, fence_mbarrier_init
from std.sys import inlined_assembly

comptime GROUPS = 2  # warpgroups that multiply
comptime THREADS = GROUPS * 128 + 128
comptime ROWS = GROUPS * 64
comptime TILE = 128  # keys
comptime STAGES = 2  # tiles of K, and of V, in flight
comptime RECORDS = 4  # of items: the one that is multiplied, the one that is stored, and those whose queries are under way
comptime HALF = 64  # dims of one swizzled half: rows of 128 bytes
comptime SW = TensorMapSwizzle.SWIZZLE_128B
comptime NOWHERE = Int32(-(1 << 20))  # a coordinate outside of the cache: the copy engine writes zeros


@always_inline
def _pin[width: SIMDLength](mut x: SIMD[F32, width]):
    """Ties accumulators to this point of the program: wgmma writes them behind the compiler's back."""
    comptime for i in range(Int(width)):
        x[i] = inlined_assembly["", Float32, constraints="=f,0", has_side_effect=True](x[i])


@always_inline
def _here(x: Int) -> Int:
    """What is computed from this is computed after it, not before a loop around it."""
    return Int(inlined_assembly["", Int32, constraints="=r,0", has_side_effect=True](Int32(x)))


@always_inline
def _pack[dtype: DType](x: SIMD[F32, TILE // 2]) -> Array[SIMD[dtype, 8], TILE // 16]:
    """Rounds scores to operands of wgmma, all of them before the first is used."""
    var packed = Array[SIMD[dtype, 8], TILE // 16](fill=0)
    comptime for i in range(TILE // 16):
        var words = bitcast[DType.uint32, 4](x.slice[8, offset=i * 8]().cast[dtype]())
        comptime for j in range(4):
            words[j] = inlined_assembly["", UInt32, constraints="=r,0", has_side_effect=True](words[j])
        packed[i] = bitcast[dtype, 8](words)
    return packed^


@always_inline
def _release[o: MutOrigin](ref[o, AddressSpace.SHARED] empty: SharedMemBarrier):
    """A warpgroup is done with a stage."""
    if thread_idx.x % 128 == 0:
        _ = empty.arrive()


comptime _Tma[page_size: Int, head_dim: Int] = TMATensorTile[
    BF16,
    coord[
        max(min(page_size, TILE) // 8, 1),
        head_dim // HALF if page_size >= 8 else 1,
        min(page_size, 8),
        HALF,
    ],
]


comptime _QueryTma = TMATensorTile[BF16, coord[ROWS, 1, 1, HALF]]  # a box has (ROWS // group, group, 1, HALF), set at the launch


struct _Shared[dtype: DType, head_dim: Int](TrivialRegisterPassable):
    """A block's shared memory: two tiles of queries, STAGES of keys and STAGES of values, each with barriers, and outputs."""

    comptime Tiles = MutPointer[Scalar[Self.dtype], MutUntrackedOrigin, address_space=AddressSpace.SHARED]
    comptime Barriers = MutPointer[SharedMemBarrier, MutUntrackedOrigin, address_space=AddressSpace.SHARED]

    comptime BYTES = (3 * ROWS + 2 * STAGES * TILE) * Self.head_dim * size_of[Self.dtype]()

    var q: Self.Tiles
    var k: Self.Tiles
    var v: Self.Tiles
    var o: Self.Tiles  # a warp's 16 rows are its own
    var known: Self.Barriers  # that there is a next item, or none
    var full_q: Self.Barriers
    var empty_q: Self.Barriers
    var full_k: Self.Barriers
    var empty_k: Self.Barriers
    var full_v: Self.Barriers
    var empty_v: Self.Barriers
    var patched: Self.Barriers  # of a last tile of values, before the producer zeroes what is past the last key
    var items: MutPointer[Int32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]  # the last RECORDS, of 8 words

    @always_inline
    def __init__(out self):
        """All threads of a block call it: the barriers are ready when it returns."""
        self.q = external_memory[Scalar[Self.dtype], address_space=AddressSpace.SHARED, alignment=1024]()
        self.k = self.q.unsafe_offset(2 * ROWS * Self.head_dim)
        self.v = self.k.unsafe_offset(STAGES * TILE * Self.head_dim)
        self.o = self.v.unsafe_offset(STAGES * TILE * Self.head_dim)
        self.known = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.full_q = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.empty_q = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.full_k = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.empty_k = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.full_v = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.empty_v = unsafe_stack_allocation[STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.patched = unsafe_stack_allocation[1, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
        self.items = unsafe_stack_allocation[RECORDS * 8, Int32, alignment=16, address_space=AddressSpace.SHARED]()
        if thread_idx.x == 0:
            comptime for i in range(2):
                self.known[unsafe_offset=i].init(1)
                self.full_q[unsafe_offset=i].init(1)
                self.empty_q[unsafe_offset=i].init(GROUPS)
            comptime for i in range(STAGES):
                self.full_k[unsafe_offset=i].init(1)
                self.full_v[unsafe_offset=i].init(1)
                self.empty_k[unsafe_offset=i].init(GROUPS)
                self.empty_v[unsafe_offset=i].init(GROUPS)
            self.patched[unsafe_offset=0].init(1)
            fence_mbarrier_init()
        barrier()


# --8<-- [start:softmax]
@always_inline
def _softmax[
    FACTOR: Float32
](
    t: Int,
    unmasked: Int,
    position: Array[Int32, 2],
    mut s: SIMD[F32, TILE // 2],
    mut m: Array[Float32, 2],
    mut l: Array[Float32, 2],
    mut fade: Array[Float32, 2],
):
    """Turns the scores s of tile t into weights; from tile `unmasked` on some row of the warpgroup ends inside the tile.

    Of a lane's two rows, at index h: position, largest score m, sum of weights l over the lane's keys, and the factor `fade` that
    what was summed before is to be multiplied with.
    """
    var lane = lane_id()
    if t >= unmasked:
        comptime for n in range(TILE // 8):
            comptime for e in range(2):
                var key = Int32(t * TILE + n * 8 + lane % 4 * 2 + e)
                comptime for h in range(2):
                    s[n * 4 + h * 2 + e] = Float32.MIN_FINITE if key > position[h] else s[n * 4 + h * 2 + e]
    comptime for h in range(2):
        var tops = SIMD[F32, 4](m[h])
        comptime for n in range(TILE // 8):
            tops[n % 4] = max(tops[n % 4], max(s[n * 4 + h * 2], s[n * 4 + h * 2 + 1]))
        var top = _quad_max(max(max(tops[0], tops[1]), max(tops[2], tops[3])))
        fade[h] = _exp2((m[h] - top) * FACTOR)
        m[h] = top
        var shift = top * FACTOR
        var sums = SIMD[F32, 4](0)
        comptime for n in range(TILE // 8):
            comptime for e in range(2):
                s[n * 4 + h * 2 + e] = _exp2(s[n * 4 + h * 2 + e].fma(FACTOR, -shift))
            sums[n % 4] += s[n * 4 + h * 2] + s[n * 4 + h * 2 + 1]
        l[h] = l[h] * fade[h] + ((sums[0] + sums[1]) + (sums[2] + sums[3]))
    # --8<-- [end:softmax]
