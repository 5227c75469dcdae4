"""The kernel of `_linear_stream_gpu`: each block streams its rows of w through a ring in shared memory.

Copies:    one thread keeps the copy engine (TMA boxes of 8 rows by 256 values of k) as far ahead as the ring is deep, and starts
           before the kernel ahead has finished (programmatic dependent launch). Rows fall to the blocks in eights, so that all
           multiprocessors have nearly the same share.
Products:  w is the mma's A (16 rows), x its B (8 tokens). A lane's 16-byte read holds 8 neighbours in k of one row; a
           sum over k may run in any order, so they serve as the k indices that two mma give that lane, and x is read
           the same way. The 8 warps share each 512 values of k; their sums are added in warp order: results repeat.
Rounding:  as in the unfused ops: r, normed x, gate and up are rounded to bfloat16.
"""

from ._linear_stream_norm_gpu import copy_rows, norm_one, norm_several, prefetch_gain
from ._prelude import *
from .silu_mul import _silu_mul
from layout import TileTensor, row_major
from layout.coord import coord
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, grid_dim
from max.gpu.compute.mma import mma
from max.gpu.memory import external_memory, fence_mbarrier_init
from max.gpu.sync import named_barrier, syncwarp
from std.utils.static_tuple import StaticTuple

# Where the multiplying warps find x: in memory as it is, or in shared memory, copied or normed there first.
comptime DIRECT = 0
comptime COPY = 1
comptime NORM = 2

comptime MAX_TOKENS = 4  # of x; the mma would take 8
comptime WARPS = 8  # that multiply; one more issues the copies
comptime THREADS = WARPS * WARP_SIZE
comptime BOX_ROWS = 8  # of a copy; a stage is two row blocks of two copies each
comptime BOX_K = 256
comptime BOX = BOX_ROWS * BOX_K
comptime KC = 2 * BOX_K  # values of k in a stage
comptime STAGE = 4 * BOX
comptime SHARE = KC // WARPS  # of a stage's k that a warp multiplies: two halves of 32
comptime GROUPS = 2  # stages of different rows whose sums are kept side by side, so that x is read once for them
comptime PART = GROUPS * 16 + 4  # floats of a token in a warp's sums
comptime MAX_STAGES = 12

comptime _Tma = TMATensorTile[BF16, coord[BOX_ROWS, BOX_K], coord[BOX_ROWS, BOX_K]]
comptime _BOX_LAYOUT = row_major[BOX_ROWS, BOX_K]
comptime _Words = SIMD[DType.uint32, 4]  # 8 bfloat16, moved about as the mma's registers


@always_inline
def _multiply[p: Int](mut acc: SIMD[F32, 4], low: _Words, high: _Words, x: _Words):
    """One mma: 4 of a lane's 8 values of k, of a row of w and of the row 8 below."""
    var a = _Words(low[2 * p], high[2 * p], low[2 * p + 1], high[2 * p + 1])
    var b = SIMD[DType.uint32, 2](x[2 * p], x[2 * p + 1])
    mma(acc, bitcast[BF16, 8](a), bitcast[BF16, 4](b), acc)


@__llvm_arg_metadata(w_tma, `nvvm.grid_constant`)
@__llvm_metadata(
    MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(THREADS + WARP_SIZE)), `nvvm.minctasm`=SIMDLength(2)
)
def _stream_kernel[
    out_dtype: DType, has_bias: Bool, INPUT: Int, GATED: Bool
](
    w_tma: _Tma,
    y: Ptr[out_dtype],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    bias: Ptr[BF16],
    m32: Int32,
    n32: Int32,
    k32: Int32,
    stages32: Int32,
    eps: Float32,
):
    """A block owns neighbouring outputs and walks over GROUPS stages of them at a time, for each along k."""
    comptime OUTPUTS = 8 if GATED else 16  # of a stage, whose row blocks are neighbours or, gated, gate and up
    comptime TILE = GROUPS * OUTPUTS
    var full = unsafe_stack_allocation[MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty = unsafe_stack_allocation[MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var ring = external_memory[Scalar[BF16], address_space=AddressSpace.SHARED, alignment=128]()
    var M = Int(m32)
    var N = Int(n32)
    var K = Int(k32)
    var stages = stages32
    var chunks = (k32 + KC - 1) // KC
    var octets = (n32 + 7) // 8
    var first = octets * Int32(block_idx.x) // Int32(grid_dim.x) * 8
    var end = min(octets * Int32(block_idx.x + 1) // Int32(grid_dim.x) * 8, n32)
    if thread_idx.x == THREADS:
        for s in range(Int(stages)):
            full[unsafe_offset=s].init(1)
            empty[unsafe_offset=s].init(Int32(WARPS))
        fence_mbarrier_init()
    barrier()
    launch_dependent_grids()
    var slot = Int32(0)

    if warp_id() == WARPS:
        if lane_id() == 0:
            w_tma.prefetch_descriptor()
            var turn = Int32(0)
            var tile = first
            while tile < end:
                for c in range(Int(chunks)):
                    comptime for g in range(GROUPS):
                        var at = tile + Int32(g * OUTPUTS)
                        if at < end:
                            if turn > 0:
                                empty[unsafe_offset=Int(slot)].wait(UInt32((turn - 1) & 1))
                            var blocks = 2 if GATED or at + 8 < end else 1
                            var halves = 2 if c * KC + BOX_K < K else 1
                            full[unsafe_offset=Int(slot)].expect_bytes(Int32(blocks * halves * BOX * 2))
                            for b in range(blocks):
                                var row = Int(at) + b * (N if GATED else 8)
                                for h in range(halves):
                                    w_tma.async_copy(
                                        TileTensor(
                                            ring.unsafe_offset(Int(slot) * STAGE + (2 * b + h) * BOX), _BOX_LAYOUT()
                                        ),
                                        full[unsafe_offset=Int(slot)],
                                        (c * KC + h * BOX_K, row),
                                    )
                            slot += 1
                            if slot == stages:
                                slot = 0
                                turn += 1
                tile += Int32(TILE)
        return

    var lane_row = Int32(lane_id()) // 4  # row of w (and 8 below it), and token of x
    var share = Int32(warp_id()) * SHARE
    var lane_k = share + Int32(lane_id()) % 4 * 8
    # Rows lie a multiple of 128 bytes apart: odd ones read the halves in the other order, and hit the other banks.
    var odd = lane_row % 2 == 1
    var words = ring.unsafe_bitcast[UInt32]()
    var mine = (share // BOX_K * BOX + lane_row * BOX_K + lane_k % BOX_K) // 2 ^ (Int32(16) if odd else 0)
    var partial = ring.unsafe_offset(Int(stages) * STAGE).unsafe_bitcast[Float32]()  # [WARPS, M, PART]
    var held = ring.unsafe_offset(Int(stages) * STAGE + 2 * WARPS * M * PART)  # x [M, K + 32] unless DIRECT
    var pitch = k32 if INPUT == DIRECT else k32 + 32
    comptime if INPUT == NORM:
        var gains = prefetch_gain(gain, K)
        wait_on_dependent_grids()
        if M == 1:
            norm_one(held, residual_out, x, residual, gains, partial, K, eps)
        else:
            norm_several(held, residual_out, x, residual, gain, partial, M, K, K + 32, eps)
    else:
        wait_on_dependent_grids()
        comptime if INPUT == COPY:
            copy_rows(held, x, M, K, K + 32)

    @always_inline
    def load_x(c: Int32, s: Int32) {imm} -> _Words:
        var at = c * KC + lane_k + s * 32
        if lane_row < m32 and at < k32:
            comptime if INPUT == DIRECT:
                return bitcast[DType.uint32, 4](x.unsafe_load[width=8, alignment=16](Int(lane_row * pitch + at)))
            else:
                return bitcast[DType.uint32, 4](held.unsafe_load[width=8, alignment=16](Int(lane_row * pitch + at)))
        return 0

    @always_inline
    def load_w(at: Int32, valid: Bool) {imm} -> _Words:
        if valid:
            return words.unsafe_load[width=4, alignment=16](Int(at))
        return 0

    var phase = UInt32(0)
    var tile = first
    while tile < end:
        # Two stages at a time: of different rows or, where one stage holds all that is left, of different k.
        var wide = tile + Int32(OUTPUTS) < end
        var step = Int32(1) if wide else 2
        var deep0 = GATED or tile + 8 < end  # whether a stage's second row block is there
        var deep1 = GATED or tile + (Int32(OUTPUTS) if wide else 0) + 8 < end
        var acc = Array[SIMD[F32, 4], 4](fill=0)  # two for each stage of a pair
        var c = Int32(0)
        while c < chunks:
            var c1 = c if wide else c + 1
            var x00 = load_x(c, 0)
            var x01 = load_x(c, 1)
            var x10 = x00
            var x11 = x01
            if not wide:
                x10 = load_x(c1, 0)
                x11 = load_x(c1, 1)
            var slot1 = slot
            var phase1 = phase
            full[unsafe_offset=Int(slot)].wait(phase)
            if c1 < chunks:
                slot1 += 1
                if slot1 == stages:
                    slot1 = 0
                    phase1 ^= 1
                full[unsafe_offset=Int(slot1)].wait(phase1)
            var inside0 = c * KC + share < k32
            var inside1 = c1 * KC + share < k32
            var at0 = slot * (STAGE // 2) + mine
            var at1 = slot1 * (STAGE // 2) + mine
            var even_low0 = load_w(at0, inside0)
            var odd_low0 = load_w(at0 ^ 16, inside0)
            var even_high0 = load_w(at0 + BOX, inside0 and deep0)
            var odd_high0 = load_w((at0 ^ 16) + BOX, inside0 and deep0)
            var even_low1 = load_w(at1, inside1)
            var odd_low1 = load_w(at1 ^ 16, inside1)
            var even_high1 = load_w(at1 + BOX, inside1 and deep1)
            var odd_high1 = load_w((at1 ^ 16) + BOX, inside1 and deep1)
            comptime for p in range(2):
                _multiply[p](acc[p], odd_low0 if odd else even_low0, odd_high0 if odd else even_high0, x00)
                _multiply[p](acc[2 + p], odd_low1 if odd else even_low1, odd_high1 if odd else even_high1, x10)
            comptime for p in range(2):
                _multiply[p](acc[p], even_low0 if odd else odd_low0, even_high0 if odd else odd_high0, x01)
                _multiply[p](acc[2 + p], even_low1 if odd else odd_low1, even_high1 if odd else odd_high1, x11)
            syncwarp()
            if lane_id() == 0:
                _ = empty[unsafe_offset=Int(slot)].arrive()
                if c1 < chunks:
                    _ = empty[unsafe_offset=Int(slot1)].arrive()
            slot = slot1 + 1
            phase = phase1
            if slot == stages:
                slot = 0
                phase ^= 1
            c += step
        var sum0 = acc[0] + acc[1]
        var sum1 = acc[2] + acc[3]
        if not wide:
            sum0 += sum1
        # A lane holds two tokens of row lane_row and of the row 8 below.
        comptime for e in range(2):
            var token = (lane_id() % 4) * 2 + e
            if token < M:
                var sums = partial.unsafe_offset((warp_id() * M + token) * PART + Int(lane_row))
                sums[unsafe_offset=0] = sum0[e]
                sums[unsafe_offset=8] = sum0[2 + e]
                if wide:
                    sums[unsafe_offset=16] = sum1[e]
                    sums[unsafe_offset=24] = sum1[2 + e]
        named_barrier[Int32(THREADS)](1)
        for i in range(thread_idx.x, M * TILE, THREADS):
            var token = i // TILE
            var output = Int(tile) + i % TILE
            var sums = partial.unsafe_offset(token * PART + i % TILE // OUTPUTS * 16 + i % OUTPUTS)

            @always_inline
            def sum(row: Int) {imm} -> Float32:
                var total = Float32(0)
                comptime for v in range(WARPS):
                    total += sums[unsafe_offset=v * M * PART + row]
                return total

            if output < Int(end):
                var value = sum(0)
                comptime if has_bias:
                    value += bias[unsafe_offset=output].cast[F32]()
                comptime if GATED:
                    value = _silu_mul[BF16, 1](value.cast[BF16](), sum(8).cast[BF16]()).cast[F32]()
                y[unsafe_offset=token * N + output] = value.cast[out_dtype]()
        if tile + Int32(TILE) < end:
            named_barrier[Int32(THREADS)](1)  # `partial` is about to be written again
        tile += Int32(TILE)
