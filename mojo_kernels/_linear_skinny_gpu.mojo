"""Few rows times a small weight: warps stream the weight from memory straight into tensor-core fragments.

Product:   a lane's 16-byte load holds 8 neighbours in k of one row. Since a sum over k may run in any order, those 8 serve
           as the k indices that two mma.m16n8k16 give that lane, and x is read the same way: no shuffles before the sums.
           Each warp of a group has a share of k; their sums are added in warp order, so that results repeat bit for bit.
x:         up to 8 rows are copied into shared memory at once. The registers are full of w; from there a warp could fetch
           little more than one fragment at a time, and each would cost it the L2 cache's latency.
Overlap:   all of w is on its way before the kernel ahead has finished (programmatic dependent launch). Few registers leave room
           for that on a multiprocessor where the kernel ahead still runs.
Gate:      a group's rows of w are 8 of gate and the same 8 of up; the sums pass the SiLU on their way out. Both are rounded first,
           as in the unfused ops. Three groups share a block, so that 0.6B's 6144 rows of w make 128 blocks.
Ahead:     weights of the products behind this one are asked into the L2 cache while the kernel ahead runs, which leaves
           the memory idle if it is decode attention.
When:      a w of less than 8 million elements, which the registers of all multiprocessors hold at once: up to 8 rows, and up to
           16 of the smallest.
"""

from ._prelude import *
from .silu_mul import _silu_mul
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_dim, grid_dim
from max.gpu.compute.mma import mma
from max.gpu.memory import CacheOperation, async_copy, async_copy_wait_all, external_memory, load
from max.gpu.sync import syncwarp
from std.sys import inlined_assembly
from std.utils.static_tuple import StaticTuple

comptime MAX_WARPS = 16
comptime STAGED_WARPS = 12  # of a block that has x in shared memory, 4 KB a warp
comptime PIECE = 2048  # elements of a weight ahead that a thread asks for
comptime _Words = SIMD[DType.uint32, 4]  # 8 bfloat16, moved about as the mma's registers


@always_inline
def _fetch(weight: Ptr[BF16], pieces: Int32):
    """Asks the L2 cache for a weight; the threads of all blocks take turns."""
    var i = Int32(thread_idx.x * grid_dim.x + block_idx.x)
    while i < pieces:
        inlined_assembly[
            "cp.async.bulk.prefetch.L2.global [$0], $1;", NoneType, constraints="l,r", has_side_effect=True
        ](weight.unsafe_offset(Int(i) * PIECE), Int32(PIECE * 2))
        i += Int32(block_dim.x * grid_dim.x)


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(MAX_WARPS * WARP_SIZE)),
    `nvvm.maxnreg`=SIMDLength(64 if TILES == 1 else 104 if GATED else 128),
)
def _skinny_kernel[
    out_dtype: DType, has_bias: Bool, HALVES: Int, TILES: Int, CHUNKS: Int, GROUPS: Int, GATED: Bool
](
    y: Ptr[out_dtype],
    x: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int32,
    n: Int32,
    k: Int32,
    ahead: Ptr[BF16],
    ahead_pieces: Int32,
    later: Ptr[BF16],
    later_pieces: Int32,
):
    """Each group of warps multiplies a run of 8*TILES rows of w; its warps take turns at steps of 32*CHUNKS values of k."""
    comptime ROWS = 8 * TILES
    comptime OUTPUTS = 8 if GATED else ROWS  # gated, a run is 8 rows of gate and 8 of up
    comptime STEP = Int32(32 * CHUNKS)
    comptime TOKENS = 8 * HALVES
    comptime SUMS = ROWS * TOKENS  # of a warp
    comptime CHAINS = 4 // TILES  # sums kept side by side, as an mma waits for the one before it
    comptime STAGED = HALVES == 1  # x goes through shared memory
    var lane = Int32(lane_id())
    var me = Int32(warp_id())
    var slices = Int32(block_dim.x) // Int32(WARP_SIZE * GROUPS)  # warps of a group
    var group = Int32(0)
    comptime for g in range(1, GROUPS):
        group += Int32(1) if me >= Int32(g) * slices else Int32(0)
    var run = Int32(block_idx.x) * Int32(GROUPS) + group
    var at_k = (me - group * slices) * STEP
    var lane_row = lane // 4  # token of x, and row of w within a tile of 8
    var lane_k = lane % 4 * 8
    var acc = Array[SIMD[F32, 4], TILES * CHAINS](fill=0)
    var wv = Array[_Words, TILES * CHUNKS](fill=0)

    # --8<-- [start:load_w]
    @always_inline
    def load_w(at_k: Int32) {mut wv, imm}:
        comptime for t in range(TILES):
            # Rows past the end repeat the last one; their sums are not stored.
            var row = min(run * Int32(OUTPUTS) + Int32(0 if GATED else t * 8) + lane_row, n - 1)
            comptime if GATED:
                row += Int32(t) * n
            var at = Int(row * k + at_k + lane_k)
            comptime for c in range(CHUNKS):
                wv[t * CHUNKS + c] = bitcast[DType.uint32, 4](
                    load[width=8, read_only=True, cache_policy=CacheOperation.GLOBAL, alignment=16](w, at + c * 32)
                )

    load_w(at_k)
    launch_dependent_grids()
    comptime if STAGED and TILES == 1:
        _fetch(ahead, ahead_pieces)
        _fetch(later, later_pieces)
    # --8<-- [end:load_w]
    # A warp's part of shared memory: its share of x, [m, 256], and then, in the same place, its sums.
    var memory = external_memory[Scalar[BF16], address_space=AddressSpace.SHARED, alignment=16]()
    var part = max(m * 256, Int32(2 * SUMS)) if STAGED else Int32(2 * SUMS)
    var mine = memory.unsafe_offset(Int(me * part))
    # Odd rows have the halves of each 128 bytes swapped, so that they hit other banks than even ones.
    var token = min(lane_row, m - 1)
    var even = mine.unsafe_offset(Int(token * 256 + lane_k + token % 2 * 32))
    var odd = mine.unsafe_offset(Int(token * 256 + lane_k - token % 2 * 32))
    wait_on_dependent_grids()
    comptime if STAGED:
        comptime for t in range(TOKENS):
            if Int32(t) < m:
                async_copy[16](
                    x.unsafe_offset(Int(Int32(t) * k + at_k + lane * 8)).unsafe_address_space_cast[AddressSpace.GLOBAL](),
                    mine.unsafe_offset(t * 256 + Int((lane ^ Int32(t % 2 * 4)) * 8)),
                )
        async_copy_wait_all()
        syncwarp()
    while True:
        comptime for c in range(CHUNKS):
            var xv = Array[_Words, 2](fill=0)
            comptime if STAGED:
                var row = even if c % 2 == 0 else odd
                xv[0] = bitcast[DType.uint32, 4](row.unsafe_load[width=8, alignment=16](c * 32))
            else:
                comptime for h in range(HALVES):
                    var row = min(lane_row + Int32(h * 8), m - 1)
                    xv[h] = bitcast[DType.uint32, 4](
                        x.unsafe_load[width=8, alignment=16](Int(row * k + at_k + lane_k) + c * 32)
                    )
            # A lane's 8 neighbours in k serve as the k indices that two mma give this lane; x and w agree on the order.
            comptime for p in range(2):
                var a = _Words(xv[0][2 * p], xv[1][2 * p], xv[0][2 * p + 1], xv[1][2 * p + 1])
                comptime for t in range(TILES):
                    comptime chain = t * CHAINS + (2 * c + p) % CHAINS
                    var b = wv[t * CHUNKS + c].slice[2, offset=2 * p]()
                    mma(acc[chain], bitcast[BF16, 8](a), bitcast[BF16, 4](b), acc[chain])
        at_k += slices * STEP
        if STAGED or at_k >= k:
            break
        load_w(at_k)
    syncwarp()  # all lanes have read x, and the sums take its place

    comptime for t in range(TILES):
        comptime for i in range(1, CHAINS):
            acc[t * CHAINS] += acc[t * CHAINS + i]
    var partial = memory.unsafe_bitcast[Float32]()
    comptime for h in range(HALVES):
        var at = Int(me * (part // 2) + (lane_row + Int32(h * 8)) * Int32(ROWS) + lane % 4 * 2)
        comptime if GATED:  # an up projection behind its gate
            var gate = acc[0].slice[2, offset=2 * h]()
            var up = acc[CHAINS].slice[2, offset=2 * h]()
            partial.unsafe_store[alignment=16](at + Int(lane % 4 * 2), gate.interleave(up))
        else:
            comptime for t in range(TILES):
                partial.unsafe_store[alignment=8](at + t * 8, acc[t * CHAINS].slice[2, offset=2 * h]())
    barrier()
    for i in range(thread_idx.x, GROUPS * SUMS, block_dim.x):  # whole warps: SUMS is a multiple of 32
        var of = Int32(UInt32(i) // UInt32(SUMS))
        var row = Int32(UInt32(i) // UInt32(ROWS) % UInt32(TOKENS))
        var column = Int32(UInt32(i) % UInt32(ROWS))
        var terms = partial.unsafe_offset(Int(of * slices * (part // 2) + row * Int32(ROWS) + column))
        var sum = Float32(0)
        comptime for v in range(STAGED_WARPS if STAGED else MAX_WARPS):
            if Int32(v) < slices:
                sum += terms[unsafe_offset=Int(Int32(v) * (part // 2))]
        var first = (Int32(block_idx.x) * Int32(GROUPS) + of) * Int32(OUTPUTS)
        comptime if GATED:
            var up = warp.shuffle_xor(sum, 1)
            var output = first + column // 2
            if column % 2 == 0 and row < m and output < n:
                var value = _silu_mul[BF16, 1](sum.cast[BF16](), up.cast[BF16]())
                y[unsafe_offset=Int(row * n + output)] = value.cast[out_dtype]()
        else:
            var output = first + column
            if row < m and output < n:
                comptime if has_bias:
                    sum += bias[unsafe_offset=Int(output)].cast[F32]()
                y[unsafe_offset=Int(row * n + output)] = sum.cast[out_dtype]()


def fits_skinny(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_skinny` is the fastest for m rows and a w of n."""
    if m <= 8:
        return k % 256 == 0 and k <= 256 * STAGED_WARPS and n * k < 8_000_000
    return m <= 16 and k % 128 == 0 and n * k < 5_000_000


def fits_skinny_gated(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_skinny_gated` is the fastest for m rows and a w of 2n."""
    return m <= 8 and k % 256 == 0 and 3 * k <= 256 * STAGED_WARPS and 2 * n * k < 8_000_000


@always_inline
def _launch[
    out_dtype: DType, has_bias: Bool, HALVES: Int, TILES: Int, CHUNKS: Int, GROUPS: Int, GATED: Bool
](
    y: Ptr[out_dtype],
    x: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    warps: Int,
    ahead: Ptr[BF16],
    ahead_size: Int,
    later: Ptr[BF16],
    later_size: Int,
    ctx: DeviceContext,
) raises:
    comptime kernel = _skinny_kernel[out_dtype, has_bias, HALVES, TILES, CHUNKS, GROUPS, GATED]
    comptime SUMS = 64 * TILES * HALVES * 4
    ctx.enqueue_function[kernel](
        y,
        x,
        w,
        bias,
        Int32(m),
        Int32(n),
        Int32(k),
        ahead,
        Int32(ahead_size // PIECE),
        later,
        Int32(later_size // PIECE),
        grid_dim=ceildiv(n, GROUPS * 8 * (1 if GATED else TILES)),
        block_dim=warps * WARP_SIZE,
        shared_mem_bytes=warps * (max(m * 512, SUMS) if HALVES == 1 else SUMS),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )


def linear_skinny[
    out_dtype: DType, has_bias: Bool
](
    y: Ptr[out_dtype],
    x: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    ahead: Ptr[BF16],
    ahead_size: Int,
    later: Ptr[BF16],
    later_size: Int,
    ctx: DeviceContext,
) raises:
    """Enqueues y[m, n] = x[m, k] w[n, k]^T (+ bias[n]), and fetches so many elements of two weights for later."""

    @always_inline
    def launch[HALVES: Int, TILES: Int, CHUNKS: Int](warps: Int) raises {imm}:
        _launch[out_dtype, has_bias, HALVES, TILES, CHUNKS, 1, False](
            y, x, w, bias, m, n, k, warps, ahead, ahead_size, later, later_size, ctx
        )

    if m > 8:
        launch[2, 2, 4](min(k // 128, MAX_WARPS))
    elif n <= 2048:  # enough blocks of 8 rows to keep all multiprocessors busy
        launch[1, 1, 8](k // 256)
    else:
        launch[1, 2, 8](k // 256)


def linear_skinny_gated(
    y: Ptr[BF16], x: Ptr[BF16], w: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext
) raises:
    """Enqueues y[m, n] = silu(x[m, k] wg[n, k]^T) * (x wu[n, k]^T), w = [wg; wu]."""
    _launch[BF16, False, 1, 2, 8, 3, True](y, x, w, w, m, n, k, 3 * (k // 256), w, 0, w, 0, ctx)
