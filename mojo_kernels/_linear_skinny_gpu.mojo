"""Few rows times a small weight: warps stream the weight from memory straight into tensor-core fragments.

A lane's 16-byte load holds 8 neighbours in k of one row. Since a sum over k may run in any order, those 8 serve as
the k indices that two mma.m16n8k16 give that lane, and x is read the same way: no shared memory and no shuffles
before the sums. The warps of a block take turns along k; their sums are added in warp order, so that results repeat
bit for bit. The first loads of w are under way before the kernel ahead has finished (programmatic dependent launch).
Chosen for a w of less than 8 million elements, which the registers of all multiprocessors hold at once: up to 8 rows,
and up to 16 of the smallest. The SiLU stays a kernel of its own here: while it runs, the next weight is loaded.
"""

from ._prelude import *
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_dim, grid_dim
from max.gpu.compute.mma import mma
from max.gpu.memory import CacheOperation, load
from max.gpu.primitives.grid_controls import PDLLevel, launch_dependent_grids
from max.gpu.primitives.grid_controls import pdl_launch_attributes, wait_on_dependent_grids
from std.utils.static_tuple import StaticTuple

comptime MAX_WARPS = 16
comptime SKINNY_ROWS = 8  # of x, up to which every small weight takes this path


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(MAX_WARPS * WARP_SIZE)))
def _skinny_kernel[
    out_dtype: DType, has_bias: Bool, HALVES: Int, TILES: Int, CHUNKS: Int
](y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m32: Int32, n32: Int32, k32: Int32):
    """Blocks walk over runs of 8*TILES rows of w; the warps of a block take turns at steps of 32*CHUNKS values of k."""
    comptime ROWS = 8 * TILES
    comptime STEP = 32 * CHUNKS
    comptime TOKENS = 8 * HALVES
    var partial = unsafe_stack_allocation[
        MAX_WARPS * ROWS * TOKENS, Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var M = Int(m32)
    var N = Int(n32)
    var K = Int(k32)
    var warps = block_dim.x // WARP_SIZE
    var runs = ceildiv(N, ROWS)
    var lane_row = lane_id() // 4  # token of x, and row of w within a tile of 8
    var lane_k = (lane_id() % 4) * 8
    var run = block_idx.x
    var k = warp_id() * STEP
    var acc = Array[SIMD[F32, 4], TILES](fill=0)
    var wv = Array[SIMD[BF16, 8], TILES * CHUNKS](fill=0)

    # --8<-- [start:load_w]
    @always_inline
    def load_w(run: Int, k: Int) {mut wv, imm}:
        comptime for t in range(TILES):
            # Rows past the end repeat the last one; their sums are not stored.
            var row = min(run * ROWS + t * 8 + lane_row, N - 1) * K
            comptime for c in range(CHUNKS):
                var at = k + c * 32 + lane_k
                wv[t * CHUNKS + c] = load[width=8, read_only=True, cache_policy=CacheOperation.GLOBAL, alignment=16](
                    w, row + at
                ) if at < K else SIMD[BF16, 8](0)

    load_w(run, k)
    launch_dependent_grids()
    wait_on_dependent_grids()
    # --8<-- [end:load_w]
    while True:
        comptime for c in range(CHUNKS):
            var at = k + c * 32 + lane_k
            var xv = Array[SIMD[BF16, 8], 2](fill=0)
            comptime for h in range(HALVES):
                var token = lane_row + h * 8
                if token < M and at < K:
                    xv[h] = x.unsafe_load[width=8, alignment=16](token * K + at)
            # A lane's 8 neighbours in k serve as the k indices that two mma give this lane; x and w agree on the order.
            comptime for p in range(2):
                var low = xv[0].slice[4, offset=4 * p]()
                var high = xv[1].slice[4, offset=4 * p]()
                var a = SIMD[BF16, 8](low[0], low[1], high[0], high[1], low[2], low[3], high[2], high[3])
                comptime for t in range(TILES):
                    mma(acc[t], a, wv[t * CHUNKS + c].slice[4, offset=4 * p](), acc[t])
        k += warps * STEP
        var finished = run
        var run_ends = k >= K
        if run_ends:
            run += grid_dim.x
            k = warp_id() * STEP
        if run < runs:
            load_w(run, k)
        if run_ends:
            var mine = partial.unsafe_offset(warp_id() * ROWS * TOKENS)
            comptime for t in range(TILES):
                comptime for h in range(HALVES):
                    mine.unsafe_store[alignment=8](
                        (lane_row + h * 8) * ROWS + t * 8 + (lane_id() % 4) * 2, acc[t].slice[2, offset=2 * h]()
                    )
                acc[t] = 0
            barrier()
            for i in range(thread_idx.x, min(M, TOKENS) * ROWS, block_dim.x):
                var sum = Float32(0)
                for v in range(warps):
                    sum += partial[unsafe_offset=v * ROWS * TOKENS + i]
                var output = finished * ROWS + i % ROWS
                if output < N:
                    comptime if has_bias:
                        sum += bias[unsafe_offset=output].cast[F32]()
                    y[unsafe_offset=i // ROWS * N + output] = sum.cast[out_dtype]()
            if run >= runs:
                break
            barrier()  # `partial` is about to be written again


def fits_skinny(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_skinny` is the fastest for up to 8 rows and a w of n."""
    return m <= SKINNY_ROWS and k % 8 == 0 and n * k < 8_000_000


def skinny_warps(k: Int) -> Int:
    """Warps of a block for steps of 256 in k."""
    var warps = ceildiv(k, 256)
    return warps if warps <= 12 else 8


def linear_skinny[
    out_dtype: DType, has_bias: Bool, HALVES: Int, TILES: Int, CHUNKS: Int
](
    y: Ptr[out_dtype],
    x: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    warps: Int,
    ctx: DeviceContext,
) raises:
    comptime kernel = _skinny_kernel[out_dtype, has_bias, HALVES, TILES, CHUNKS]
    ctx.enqueue_function[kernel](
        y,
        x,
        w,
        bias,
        Int32(m),
        Int32(n),
        Int32(k),
        grid_dim=ceildiv(n, 8 * TILES),
        block_dim=warps * WARP_SIZE,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
