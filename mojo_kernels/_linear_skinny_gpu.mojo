"""Few rows times a small weight: warps stream the weight from memory straight into tensor-core fragments.

Product:   a lane's 16-byte load holds 8 neighbours in k of one row. Since a sum over k may run in any order, those 8 serve
           as the k indices that two mma.m16n8k16 give that lane, and x is read the same way: no shuffles before the sums.
           The warps of a group share k; their sums are added in warp order, so that results repeat bit for bit.
Overlap:   all of w is on its way before the kernel ahead has finished (programmatic dependent launch). Registers are capped so
           that a block fits on a multiprocessor beside one of the kernel ahead: without that it could not start early.
Norm, gate: a group is what shares a row run of w; several groups in a block share the RMSNorm of x + residual, which every block
           does again for itself (`_linear_skinny_norm_gpu`). Gated, a run is 8 rows of gate and the 8 of up, and the sums pass
           the SiLU on their way out; both are rounded first, as in the unfused ops.
When:      a w of less than 8 million elements, which the registers of all multiprocessors hold at once: up to 8 rows, and up to
           16 of the smallest; k is a multiple of 256, and with the norm at most 1024.
"""

from ._linear_skinny_norm_gpu import MAX_NORM_K, MAX_SLICES, PITCH, SLICE, norm_rows
from ._prelude import *
from .silu_mul import _silu_mul
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, block_dim
from max.gpu.compute.mma import mma
from max.gpu.memory import CacheOperation, load
from std.utils.static_tuple import StaticTuple

comptime MAX_WARPS = 16
comptime _Words = SIMD[DType.uint32, 4]  # 8 bfloat16, moved about as the mma's registers


@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(MAX_WARPS * WARP_SIZE)),
    `nvvm.maxnreg`=SIMDLength(104 if NORM else 64),
)
def _skinny_kernel[
    out_dtype: DType,
    has_bias: Bool,
    HALVES: Int,
    TILES: Int,
    CHUNKS: Int,
    GROUPS: Int,
    NORM: Bool,
    GATED: Bool,
](
    y: Ptr[out_dtype],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m32: Int32,
    n32: Int32,
    k32: Int32,
    eps: Float32,
):
    """Each group of warps multiplies a run of 8*TILES rows of w; its warps take turns at steps of 32*CHUNKS values of k."""
    comptime ROWS = 8 * TILES
    comptime OUTPUTS = 8 if GATED else ROWS  # gated, a run is 8 rows of gate and 8 of up
    comptime STEP = 32 * CHUNKS
    comptime TOKENS = 8 * HALVES
    comptime CHAINS = 4 // TILES  # sums kept side by side, as an mma waits for the one before it
    var partial = unsafe_stack_allocation[
        MAX_WARPS * ROWS * TOKENS, Float32, address_space=AddressSpace.SHARED, alignment=16
    ]()
    var M = Int(m32)
    var N = Int(n32)
    var K = Int(k32)
    var slices = block_dim.x // (WARP_SIZE * GROUPS)
    var group = 0
    comptime for g in range(1, GROUPS):
        group += 1 if warp_id() >= g * slices else 0
    var slice = warp_id() - group * slices
    var lane_row = lane_id() // 4  # token of x, and row of w within a tile of 8
    var lane_k = (lane_id() % 4) * 8
    var run = block_idx.x * GROUPS + group
    var k = slice * STEP
    var acc = Array[SIMD[F32, 4], TILES * CHAINS](fill=0)
    var wv = Array[_Words, TILES * CHUNKS](fill=0)

    # --8<-- [start:load_w]
    @always_inline
    def load_w(k: Int) {mut wv, imm}:
        comptime for t in range(TILES):
            # Rows past the end repeat the last one; their sums are not stored.
            var row = min(run * OUTPUTS + (0 if GATED else t * 8) + lane_row, N - 1)
            comptime if GATED:
                row += t * N
            var at = row * K + k + lane_k
            comptime for c in range(CHUNKS):
                wv[t * CHUNKS + c] = bitcast[DType.uint32, 4](
                    load[width=8, read_only=True, cache_policy=CacheOperation.GLOBAL, alignment=16](w, at + c * 32)
                )

    load_w(k)
    launch_dependent_grids()
    # --8<-- [end:load_w]
    var held = unsafe_stack_allocation[
        2 * TOKENS * PITCH if NORM else 8, Scalar[BF16], address_space=AddressSpace.SHARED, alignment=16
    ]()
    comptime if NORM:
        var sums = unsafe_stack_allocation[TOKENS * MAX_SLICES, Float32, address_space=AddressSpace.SHARED]()
        var gains = gain.unsafe_load[width=8, alignment=16](k + lane_id() * 8)
        wait_on_dependent_grids()
        norm_rows[GROUPS](held, sums, residual_out, x, residual, gains, group, slice, slices, M, K, eps)
    else:
        wait_on_dependent_grids()

    while True:
        comptime for c in range(CHUNKS):
            var at = k + c * 32 + lane_k
            var xv = Array[_Words, 2](fill=0)
            comptime for h in range(HALVES):
                var token = min(lane_row + h * 8, M - 1)  # rows past the end repeat the last one, as above
                comptime if NORM:
                    xv[h] = bitcast[DType.uint32, 4](held.unsafe_load[width=8, alignment=16](token * PITCH + at))
                else:
                    xv[h] = bitcast[DType.uint32, 4](x.unsafe_load[width=8, alignment=16](token * K + at))
            # A lane's 8 neighbours in k serve as the k indices that two mma give this lane; x and w agree on the order.
            comptime for p in range(2):
                var a = _Words(xv[0][2 * p], xv[1][2 * p], xv[0][2 * p + 1], xv[1][2 * p + 1])
                comptime for t in range(TILES):
                    comptime chain = t * CHAINS + (2 * c + p) % CHAINS
                    var b = wv[t * CHUNKS + c].slice[2, offset=2 * p]()
                    mma(acc[chain], bitcast[BF16, 8](a), bitcast[BF16, 4](b), acc[chain])
        k += slices * STEP
        if NORM or k >= K:
            break
        load_w(k)

    comptime for t in range(TILES):
        comptime for i in range(1, CHAINS):
            acc[t * CHAINS] += acc[t * CHAINS + i]
    var mine = partial.unsafe_offset(warp_id() * ROWS * TOKENS)
    comptime for h in range(HALVES):
        var at = (lane_row + h * 8) * ROWS + (lane_id() % 4) * 2
        comptime if GATED:  # an up projection behind its gate
            var gate = acc[0].slice[2, offset=2 * h]()
            mine.unsafe_store[alignment=16](
                at + (lane_id() % 4) * 2, gate.interleave(acc[CHAINS].slice[2, offset=2 * h]())
            )
        else:
            comptime for t in range(TILES):
                mine.unsafe_store[alignment=8](at + t * 8, acc[t * CHAINS].slice[2, offset=2 * h]())
    barrier()
    for i in range(thread_idx.x, GROUPS * TOKENS * ROWS, block_dim.x):
        var token = i // ROWS % TOKENS
        var of = i // (ROWS * TOKENS)
        var sum = Float32(0)
        var terms = partial.unsafe_offset(of * slices * ROWS * TOKENS + i % (ROWS * TOKENS))
        comptime for v in range(MAX_SLICES if NORM else MAX_WARPS):
            if v < slices:
                sum += terms[unsafe_offset=v * ROWS * TOKENS]
        comptime if GATED:
            var up = warp.shuffle_xor(sum, 1)
            var output = (block_idx.x * GROUPS + of) * OUTPUTS + i % ROWS // 2
            if i % 2 == 0 and token < M and output < N:
                y[unsafe_offset=token * N + output] = rebind[Scalar[out_dtype]](
                    _silu_mul[BF16, 1](sum.cast[BF16](), up.cast[BF16]())
                )
        else:
            var output = (block_idx.x * GROUPS + of) * OUTPUTS + i % ROWS
            if token < M and output < N:
                comptime if has_bias:
                    sum += bias[unsafe_offset=output].cast[F32]()
                y[unsafe_offset=token * N + output] = sum.cast[out_dtype]()


def fits_skinny(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_skinny` is the fastest for m rows and a w of n."""
    return (m <= 8 and k % 256 == 0 and n * k < 8_000_000) or (m <= 16 and k % 128 == 0 and n * k < 5_000_000)


def fits_skinny_norm(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_skinny_norm` is the fastest for m rows and a w of n."""
    return m <= 8 and k <= MAX_NORM_K and fits_skinny(m, n, k)


def linear_skinny[
    out_dtype: DType, has_bias: Bool
](y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Enqueues y[m, n] = x[m, k] w[n, k]^T (+ bias[n])."""

    @always_inline
    def launch[HALVES: Int, TILES: Int, CHUNKS: Int](warps: Int) raises {imm}:
        comptime kernel = _skinny_kernel[out_dtype, has_bias, HALVES, TILES, CHUNKS, 1, False, False]
        ctx.enqueue_function[kernel](
            y,
            x,  # no residual to write
            x,
            x,
            x,
            w,
            bias,
            Int32(m),
            Int32(n),
            Int32(k),
            Float32(0),
            grid_dim=ceildiv(n, 8 * TILES),
            block_dim=warps * WARP_SIZE,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if m <= 8:
        launch[1, 1, 8](k // 256 if k <= 12 * 256 else 8)
    else:
        launch[2, 2, 4](min(k // 128, MAX_WARPS))


def linear_skinny_norm[
    has_bias: Bool, GATED: Bool
](
    y: Ptr[BF16],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues the product y [m, n] of the normed x + residual; w has n rows or, gated, 2n.

    `residual_out` must not be `residual`, which every block reads.
    """
    # So many that the 0.6B's 4096 rows of w, and the 6144 of gate and up, make 128 blocks, which share the norm's work.
    comptime GROUPS = 3 if GATED else 2
    comptime kernel = _skinny_kernel[BF16, has_bias, 1, 2, 8, GROUPS, True, GATED]
    ctx.enqueue_function[kernel](
        y,
        residual_out,
        x,
        residual,
        gain,
        w,
        bias,
        Int32(m),
        Int32(n),
        Int32(k),
        eps,
        grid_dim=ceildiv(n, GROUPS * (8 if GATED else 16)),
        block_dim=GROUPS * (k // SLICE) * WARP_SIZE,
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
