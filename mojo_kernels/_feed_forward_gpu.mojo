"""A layer behind its attention in one launch, for few rows: o, residual add, norm, gate and up, SiLU, down.

Weights:   each of 128 blocks has an equal share of gate and up, and 8 rows of down; the first 64 have 16 rows of o, since the
           others mostly start only when attention makes room for them, when o is wanted at once. Bulk copies fetch all of a
           share into shared memory before the kernel ahead has finished; where o was, its blocks then put their rows of down,
           which have been asked into the L2 cache. A quarter of shared memory stays free for the product behind this kernel.
Products:  as in `_linear_skinny_gpu`: the 8 warps share k; a lane's 8 neighbours in k are the k indices that two mma give it. w
           is in registers before x is there. The sums of the warps are added in their order: results repeat bit for bit.
Exchange:  every block needs all sums of o and all activations: `_feed_forward_exchange_gpu`.
Residency: a block waits for all others, so all must run at the same time: `fits_feed_forward` asks the device. Kernels ahead end
           by themselves, and those behind come in only when all blocks have started (launch_dependent_grids).
Rounding:  as in the unfused ops: the sums of o, r, normed x, gate, up and activations are rounded to bfloat16.
"""

from ._feed_forward_exchange_gpu import HEAD, MAX_TOKENS, Exchange, await_lines, next_tag, publish, store_tag
from ._feed_forward_parts_gpu import PAD, THREADS, WARPS, Words, fetch_row, fragments, multiply, prefetch_row, total
from ._prelude import *
from .silu_mul import _silu_mul
from layout.tma_async import SharedMemBarrier
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from max.gpu.host import DeviceAttribute, FuncAttribute
from max.gpu.memory import external_memory, fence_mbarrier_init
from max.gpu.sync import syncwarp
from std.utils.static_tuple import StaticTuple

comptime BLOCKS = 128
comptime HALF = BLOCKS // 2  # the first blocks, which have o
comptime ROWS_O = 16  # of each of them
comptime ROWS_DOWN = 8  # of every block


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(THREADS)), `nvvm.maxnreg`=SIMDLength(168))
def _feed_forward_kernel[
    Q: Int, H: Int, I: Int, TOKENS: Int
](
    y: Ptr[BF16],
    residual_out: Ptr[BF16],
    attended: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    w_o: Ptr[BF16],
    w_gate_up: Ptr[BF16],
    w_down: Ptr[BF16],
    exchange: Exchange,
    m32: Int32,
    eps: Float32,
):
    """Up to TOKENS rows; attended has Q columns, the residual stream H, and there are I gates."""
    comptime GATES = I // BLOCKS  # of a block
    comptime TILES = GATES // 4  # eights of gates and of ups
    comptime SHARE_Q = Q // WARPS
    comptime SHARE_H = H // WARPS
    comptime SHARE_I = I // WARPS
    comptime PITCH_I = SHARE_I + PAD
    comptime LINES = SHARE_I // (4 * WARP_SIZE)
    comptime FEW_O = TOKENS * ROWS_O
    comptime FEW_DOWN = TOKENS * ROWS_DOWN
    comptime MANY = TOKENS * 2 * GATES
    comptime assert H == HALF * ROWS_O and ROWS_DOWN * (I + PAD) <= ROWS_O * (Q + PAD) and SHARE_H == 4 * WARP_SIZE
    comptime assert TOKENS * PITCH_I * WARPS <= 2 * GATES * (H + PAD)
    var arrival = unsafe_stack_allocation[2, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var held_gu = external_memory[Scalar[BF16], address_space=AddressSpace.SHARED, alignment=128]()
    var held = held_gu.unsafe_offset(2 * GATES * (H + PAD))  # rows of o, then of down
    var few = held.unsafe_offset(ROWS_O * (Q + PAD)).unsafe_bitcast[Float32]()  # sums of o, then of down
    var many = few.unsafe_offset(WARPS * FEW_O)  # sums of gate and up
    var squares = many.unsafe_offset(WARPS * MANY)
    var m = Int(m32)
    var block = block_idx.x
    var is_early = block < HALF
    var warp_index = warp_id()
    var lane = lane_id()
    var lane_row = lane // 4  # row of w within a tile, and token of x
    var lane_k = lane % 4 * 8

    if thread_idx.x == 0:
        arrival[unsafe_offset=0].init(1)
        arrival[unsafe_offset=1].init(1)
        fence_mbarrier_init()
        arrival[unsafe_offset=0].expect_bytes(Int32(ROWS_O * Q * 2 if is_early else ROWS_DOWN * I * 2))
        arrival[unsafe_offset=1].expect_bytes(Int32(2 * GATES * H * 2))
    barrier()
    launch_dependent_grids()

    @always_inline
    def fetch_down(i: Int) {imm}:
        fetch_row[I](held.unsafe_offset(i * (I + PAD)), w_down.unsafe_offset((block * ROWS_DOWN + i) * I), arrival)

    # Thread (warp, lane) fetches row lane * 8 + warp of all that the block holds: o, gate and up, or gate, up and down.
    var row = lane * WARPS + warp_index
    if is_early and row < ROWS_O:
        fetch_row[Q](held.unsafe_offset(row * (Q + PAD)), w_o.unsafe_offset((block * ROWS_O + row) * Q), arrival)
    var i = row - (ROWS_O if is_early else 0)
    if 0 <= i < 2 * GATES:
        fetch_row[H](
            held_gu.unsafe_offset(i * (H + PAD)),
            w_gate_up.unsafe_offset((block * GATES + i + (I - GATES if i >= GATES else 0)) * H),
            arrival.unsafe_offset(1),
        )
    i -= 2 * GATES
    if 0 <= i < ROWS_DOWN:
        if is_early:
            prefetch_row[I](w_down.unsafe_offset((block * ROWS_DOWN + i) * I))
        else:
            fetch_down(i)
    var mine = warp_index * SHARE_H + lane * 4  # this thread's values of a row of the residual stream
    var gains = gain.unsafe_load[width=4, alignment=8](mine)
    var wv_o = Array[Words, ROWS_O // 8 * (SHARE_Q // 32)](fill=0)
    if is_early:
        arrival[unsafe_offset=0].wait(0)
        wv_o = fragments[ROWS_O // 8, SHARE_Q // 32, Q + PAD](
            held.unsafe_offset(lane_row * (Q + PAD) + warp_index * SHARE_Q + lane_k)
        )

    wait_on_dependent_grids()
    var tag = next_tag(exchange)
    var first = exchange.unsafe_offset(HEAD)  # sums of o, [token, H / 2]
    var second = first.unsafe_offset(MAX_TOKENS * H // 2)  # activations, [token, I / 2]
    var added = Array[SIMD[BF16, 4], TOKENS](fill=0)
    comptime for t in range(TOKENS):
        if t < m:
            added[t] = residual.unsafe_load[width=4, alignment=8](t * H + mine)
    if is_early:
        var xv = Array[Words, SHARE_Q // 32](fill=0)
        if lane_row < m:
            comptime for s in range(SHARE_Q // 32):
                xv[s] = bitcast[DType.uint32, 4](
                    attended.unsafe_load[width=8, alignment=16](lane_row * Q + warp_index * SHARE_Q + lane_k + s * 32)
                )
        multiply[ROWS_O // 8, SHARE_Q // 32, TOKENS](wv_o, xv, few.unsafe_offset(warp_index * FEW_O))
        barrier()
        if thread_idx.x < m * (ROWS_O // 2):
            var t = thread_idx.x // (ROWS_O // 2)
            var pair = thread_idx.x % (ROWS_O // 2)
            publish(
                first.unsafe_offset(t * (H // 2) + block * (ROWS_O // 2) + pair),
                total[FEW_O](few, t * ROWS_O + 2 * pair),
                tag,
            )
        if thread_idx.x == 0:
            arrival[unsafe_offset=0].expect_bytes(Int32(ROWS_DOWN * I * 2))
        if row < ROWS_DOWN:  # o has been read
            fetch_down(row)

    # Residual add and norm, by every block for all rows.
    arrival[unsafe_offset=1].wait(0)
    var wv_gu = fragments[TILES, SHARE_H // 32, H + PAD](
        held_gu.unsafe_offset(lane_row * (H + PAD) + warp_index * SHARE_H + lane_k)
    )
    var x = await_lines[TOKENS, 1](first.unsafe_offset(mine // 2), H // 2, m, tag)
    comptime for t in range(TOKENS):
        if t < m:
            added[t] = (x[t].cast[F32]() + added[t].cast[F32]()).cast[BF16]()
            var f = added[t].cast[F32]()
            var square = warp.sum((f * f).reduce_add())
            if lane == 0:
                squares[unsafe_offset=t * WARPS + warp_index] = square
    barrier()
    # All weights of gate and up are in registers now: each warp keeps its share of x in their place.
    var own = held_gu.unsafe_offset(warp_index * (TOKENS * PITCH_I))
    comptime for t in range(TOKENS):
        if t < m:
            var total = Float32(0)
            comptime for v in range(WARPS):
                total += squares[unsafe_offset=t * WARPS + v]
            var normed = added[t].cast[F32]() * (1 / sqrt(total / Float32(H) + eps)) * gains.cast[F32]()
            own.unsafe_store[alignment=8](t * (SHARE_H + PAD) + lane * 4, normed.cast[BF16]())
            if block == 0:
                residual_out.unsafe_store[alignment=8](t * H + mine, added[t])
    syncwarp()
    var token = min(lane_row, TOKENS - 1)
    var normed = fragments[1, SHARE_H // 32, 0](own.unsafe_offset(token * (SHARE_H + PAD) + lane_k))
    multiply[TILES, SHARE_H // 32, TOKENS](wv_gu, normed, many.unsafe_offset(warp_index * MANY))
    barrier()
    if thread_idx.x < m * (GATES // 2):
        var t = thread_idx.x // (GATES // 2)
        var pair = thread_idx.x % (GATES // 2)
        var gates = total[MANY](many, t * 2 * GATES + 2 * pair)
        var ups = total[MANY](many, t * 2 * GATES + GATES + 2 * pair)
        publish(
            second.unsafe_offset(t * (I // 2) + block * (GATES // 2) + pair), _silu_mul[BF16, 2](gates, ups), tag
        )

    arrival[unsafe_offset=0].wait(UInt32(1) if is_early else UInt32(0))
    var wv_down = fragments[ROWS_DOWN // 8, SHARE_I // 32, I + PAD](
        held.unsafe_offset(lane_row * (I + PAD) + warp_index * SHARE_I + lane_k)
    )
    var acts = await_lines[TOKENS, LINES](
        second.unsafe_offset((warp_index * SHARE_I + lane * 4) // 2), I // 2, m, tag
    )
    comptime for i in range(TOKENS * LINES):
        own.unsafe_store[alignment=8](
            i // LINES * PITCH_I + i % LINES * 4 * WARP_SIZE + lane * 4, acts[i]
        )
    syncwarp()
    var gated = fragments[1, SHARE_I // 32, 0](own.unsafe_offset(token * PITCH_I + lane_k))
    multiply[ROWS_DOWN // 8, SHARE_I // 32, TOKENS](wv_down, gated, few.unsafe_offset(warp_index * FEW_DOWN))
    barrier()
    if thread_idx.x < m * (ROWS_DOWN // 2):
        var t = thread_idx.x // (ROWS_DOWN // 2)
        var pair = thread_idx.x % (ROWS_DOWN // 2)
        y.unsafe_store[alignment=4](
            t * H + block * ROWS_DOWN + 2 * pair, total[FEW_DOWN](few, t * ROWS_DOWN + 2 * pair)
        )
    if block == BLOCKS - 1 and thread_idx.x == 0:
        store_tag(exchange, tag)  # all have read the old one: their activations were there


def suits_feed_forward(q: Int, h: Int, i: Int) -> Bool:
    """Whether 128 blocks have equal shares of such weights, and room for them in shared memory."""
    var is_even = h == ROWS_O * HALF and i % (4 * WARPS * WARP_SIZE) == 0 and q % (32 * WARPS) == 0
    return is_even and i <= 2 * q and q + 3 * i <= 12288


def fits_feed_forward(m: Int, ctx: DeviceContext) raises -> Bool:
    """Whether `feed_forward_gpu` takes m rows on this device, all of whose blocks must run at the same time."""
    return m <= MAX_TOKENS and ctx.get_attribute(DeviceAttribute.MULTIPROCESSOR_COUNT) >= BLOCKS


def feed_forward_gpu[
    Q: Int, H: Int, I: Int
](
    y: Ptr[BF16],
    residual_out: Ptr[BF16],
    attended: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    w_o: Ptr[BF16],
    w_gate_up: Ptr[BF16],
    w_down: Ptr[BF16],
    exchange: Exchange,
    m: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """Enqueues all of it for m rows."""

    @always_inline
    def launch[TOKENS: Int]() raises {imm}:
        comptime kernel = _feed_forward_kernel[Q, H, I, TOKENS]
        comptime HELD = ROWS_O * (Q + PAD) + 2 * I // BLOCKS * (H + PAD)
        comptime BYTES = HELD * 2 + WARPS * TOKENS * (ROWS_O + 2 * I // BLOCKS + 1) * 4
        ctx.enqueue_function[kernel](
            y,
            residual_out,
            attended,
            residual,
            gain,
            w_o,
            w_gate_up,
            w_down,
            exchange,
            Int32(m),
            eps,
            grid_dim=BLOCKS,
            block_dim=THREADS,
            shared_mem_bytes=BYTES,
            func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(BYTES)),
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    if m == 1:
        launch[1]()
    elif m == 2:
        launch[2]()
    else:
        launch[4]()
