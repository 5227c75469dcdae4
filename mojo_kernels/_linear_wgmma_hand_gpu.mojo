"""How a wide gated tile leaves the registers of the warps that multiply: handed over in shared memory to three idle warps.

A gate needs two roundings, an exponential and a reciprocal a value. Done by the consumers that is time in which no tensor
core works; but the producer's warpgroup has three warps with nothing to do. So the consumers only round their sums, put
them down and go on to the next tile, while those three gate, transpose and store the last one. Two barriers for each
warpgroup of consumers say that its buffer is filled, and that it is free again.

Knows the fragment of a wgmma as `_linear_wgmma_store_gpu` does. A thread puts down vectors of four words, a word being
two neighbouring columns: vector 2 j + h holds the words of row h * 8 of columns 32 j, 32 j + 8, 32 j + 16 and 32 j + 24.
"""

from ._linear_wgmma_store_gpu import gate_pair, round_pair, store_quad
from ._linear_wgmma_walk_gpu import tile_origin
from ._prelude import *
from layout import TileTensor
from layout.tma_async import SharedMemBarrier

comptime HANDS = 3  # warps that finish tiles
comptime _FIRST = 9  # of them, behind two warpgroups and the producer
comptime _COLUMNS = 256  # of a tile, gates and then as many up projections
comptime _WORDS = 64 * _COLUMNS // 2  # of a warpgroup's part of a tile
comptime HAND_BYTES = 2 * _WORDS * 4
"""Shared memory behind the ring of a block of two warpgroups."""

comptime _Barriers = MutPointer[SharedMemBarrier, _, address_space=AddressSpace.SHARED]
comptime _Buffer = MutPointer[Float32, _, address_space=AddressSpace.SHARED]


@always_inline
def init_hands(barriers: _Barriers):
    """Prepares four barriers: filled by each warpgroup, then freed for each; every thread arrives for itself."""
    comptime for group in range(2):
        barriers[unsafe_offset=group].init(128)
        barriers[unsafe_offset=2 + group].init(Int32(32 * HANDS))


@always_inline
def hand_over(
    acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...],
    buffer: _Buffer,
    barriers: _Barriers,
    group: Int,
    turn: UInt32,
):
    """Puts a consumer's fragment of its tile number `turn` down, when the tile before it has been read."""
    if turn > 0:
        barriers[unsafe_offset=2 + group].wait((turn - 1) & 1)
    var to = buffer.unsafe_bitcast[UInt32]().unsafe_offset(group * _WORDS + thread_idx.x % 128 * 4)
    comptime for v in range(_COLUMNS // 16):
        var words = SIMD[DType.uint32, 4](0)
        comptime for i in range(4):
            comptime E = 4 * (v // 2 * 4 + i) + v % 2 * 2
            words[i] = round_pair(acc[0, E][0], acc[0, E + 1][0])
        to.unsafe_store[alignment=16](v * 512, words)
    _ = barriers[unsafe_offset=group].arrive()


@always_inline
def finish_tiles[
    SHARE: Int
](
    y: Ptr[BF16],
    buffer: _Buffer,
    barriers: _Barriers,
    first: Int,
    stride: Int,
    a_tiles: Int,
    b_tiles: Int,
    rank: Int,
    M: Int,
    N: Int,
):
    """Gates and stores a block's tiles as they are handed over; a warp takes every third piece of 16 rows by 32 outputs."""
    comptime QUADS = _COLUMNS // 64  # of 32 outputs
    var words_of = buffer.unsafe_bitcast[UInt32]()
    var turn = UInt32(0)
    for tile in range(first, a_tiles * b_tiles, stride):
        var at = tile_origin[SHARE, 128, _COLUMNS // 2](tile, a_tiles, b_tiles, rank)
        comptime for group in range(2):
            barriers[unsafe_offset=group].wait(turn & 1)
            for item in range(warp_id() - _FIRST, 4 * QUADS, HANDS):
                var of_warp = item % 4
                var quad = item // 4
                var token = at[0] + group * 64 + of_warp * 16 + lane_id() // 4
                var from_ = words_of.unsafe_offset(group * _WORDS + (quad * 256 + of_warp * 32 + lane_id()) * 4)
                comptime for half in range(2):
                    var words = from_.unsafe_load[width=4, alignment=16](half * 512)
                    var ups = from_.unsafe_load[width=4, alignment=16](half * 512 + QUADS * 1024)
                    comptime for i in range(4):
                        words[i] = gate_pair(words[i], ups[i])
                    store_quad(y, words, token + half * 8, at[1] + quad * 32, M, N)
            _ = barriers[unsafe_offset=2 + group].arrive()
        turn += 1
