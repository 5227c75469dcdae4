"""What the products of `_feed_forward_gpu` are made of: rows of w fetched, read as fragments, multiplied, and summed up."""

from ._prelude import *
from layout.tma_async import SharedMemBarrier
from max.gpu.compute.mma import mma
from std.sys import inlined_assembly

comptime WARPS = 8
comptime THREADS = WARPS * WARP_SIZE
comptime PAD = 32  # values behind each row in shared memory, so that two neighbours do not hit the same banks
comptime Words = SIMD[DType.uint32, 4]  # 8 bfloat16, moved about as the mma's registers
comptime _Shared[dtype: DType] = MutPointer[Scalar[dtype], _, address_space=AddressSpace.SHARED]


@always_inline
def fetch_row[
    K: Int
](
    to: _Shared[BF16],
    row: Ptr[BF16],
    arrival: MutPointer[SharedMemBarrier, _, address_space=AddressSpace.SHARED],
):
    """Starts copying a row of K values into shared memory; `arrival` counts its bytes."""
    inlined_assembly[
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
        NoneType,
        constraints="r,l,r,r,~{memory}",
        has_side_effect=True,
    ](Int32(Int(to)), row, Int32(K * 2), Int32(Int(arrival)))


@always_inline
def prefetch_row[K: Int](row: Ptr[BF16]):
    """Asks the L2 cache for a row."""
    inlined_assembly[
        "cp.async.bulk.prefetch.L2.global [$0], $1;", NoneType, constraints="l,r", has_side_effect=True
    ](row, Int32(K * 2))


@always_inline
def fragments[TILES: Int, STEPS: Int, PITCH: Int](at: _Shared[BF16]) -> Array[Words, TILES * STEPS]:
    """Reads a lane's part of rows (`at` is its first) of w, or of x."""
    var v = Array[Words, TILES * STEPS](fill=0)
    comptime for t in range(TILES):
        comptime for s in range(STEPS):
            v[t * STEPS + s] = bitcast[DType.uint32, 4](
                at.unsafe_load[width=8, alignment=16](t * 8 * PITCH + s * 32)
            )
    return v^


@always_inline
def multiply[
    TILES: Int, STEPS: Int, TOKENS: Int
](w: Array[Words, TILES * STEPS], x: Array[Words, STEPS], sums: _Shared[F32]):
    """Puts this warp's sums of TILES eights of rows, [TOKENS, 8 TILES]."""
    comptime CHAINS = 4 // TILES if TILES <= 2 else 1  # sums kept side by side, as an mma waits for the one before it
    var acc = Array[SIMD[F32, 4], TILES * CHAINS](fill=0)
    comptime for s in range(STEPS):
        comptime for p in range(2):
            var a = Words(x[s][2 * p], 0, x[s][2 * p + 1], 0)
            comptime for t in range(TILES):
                comptime chain = t * CHAINS + (2 * s + p) % CHAINS
                var b = w[t * STEPS + s].slice[2, offset=2 * p]()
                mma(acc[chain], bitcast[BF16, 8](a), bitcast[BF16, 4](b), acc[chain])
    var token = lane_id() // 4
    comptime for t in range(TILES):
        comptime for i in range(1, CHAINS):
            acc[t * CHAINS] += acc[t * CHAINS + i]
        if token < TOKENS:
            sums.unsafe_store[alignment=8](
                token * 8 * TILES + t * 8 + lane_id() % 4 * 2, acc[t * CHAINS].slice[2, offset=0]()
            )


@always_inline
def total[SIZE: Int](sums: _Shared[F32], at: Int) -> SIMD[BF16, 2]:
    """Adds up two neighbours over the warps, whose sums lie SIZE apart."""
    var total = SIMD[F32, 2](0)
    comptime for v in range(WARPS):
        total += sums.unsafe_load[width=2, alignment=8](v * SIZE + at)
    return total.cast[BF16]()
