"""Products of 9 to 256 rows on Hopper: a block has one tile of w, or a part of its k, and all of it in flight before x is there.

There w is everything and a product lasts microseconds, so what counts is the time to the first copy and what stands between
two of them. A tile is 64 or 128 rows of w, operand A of `wgmma`, by up to 128 tokens, operand B; of a gated product half of
its rows are gates and half their up projections. One thread prepares the barriers and brings w at once, while the kernel ahead
still runs, then x; a copy brings CHUNKS times 64 of k, for which the tensors are seen as [K / 64, rows, 64], and is a stage of
a ring with one barrier for full and one for empty. The tiles of a block's warpgroups lie one below the other in a stage. Tile,
split of k and depth of a stage are known at compile time, and every number that a warp shares is one to the compiler too: operands
of `wgmma` are then counted in uniform registers, where they had been moved there, four a product.

With fewer tiles than multiprocessors the blocks of a cluster split k: `_linear_few_store_gpu`. Sums are added in a fixed order.
"""

from ._linear_few_store_gpu import SKEW, cluster_arrive, cluster_wait, held_octets, inbox_bytes
from ._linear_few_store_gpu import send_shares, store_tile, sum_shares
from ._paged_attention_gpu_prefill_parts import _pin
from ._prelude import *
from layout.coord import coord
from layout.tma_async import SharedMemBarrier, TMATensorTile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from max.gpu.compute.mma import WGMMADescriptor, wgmma_async
from max.gpu.compute.mma import wgmma_commit_group_sync, wgmma_fence_aligned, wgmma_wait_group_sync
from max.gpu.host import DeviceBuffer, Dim, FuncAttribute
from max.gpu.host.nvidia.tma import TensorMapSwizzle, create_tma_descriptor
from max.gpu.memory import cp_async_bulk_tensor_shared_cluster_global, external_memory
from max.gpu.memory import fence_async_view_proxy, fence_mbarrier_init
from std.utils.index import Index
from std.utils.static_tuple import StaticTuple

comptime _BK = 64  # 64 bfloat16 = 128 bytes = one row of the 128-byte swizzle atom
comptime _SW = TensorMapSwizzle.SWIZZLE_128B
comptime _MAX_STAGES = 16
comptime _SHARED_BYTES = 229_376  # of a multiprocessor, for the rings and tiles of its blocks
comptime _Map = TMATensorTile[BF16, coord[1, 1, 64, _BK]]  # the boxes are set at the launch


@__llvm_arg_metadata(w_map, `nvvm.grid_constant`)
@__llvm_arg_metadata(x_map, `nvvm.grid_constant`)
@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(128 * GROUPS + 32)))
def _few_kernel[
    has_bias: Bool, GATED: Bool, GROUPS: Int, COLUMNS: Int, SPLIT: Int, CHUNKS: Int
](
    w_map: _Map,
    x_map: _Map,
    y: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int32,
    n: Int32,
    steps: UInt32,
    stages: UInt32,
):
    """One tile of 64 * GROUPS rows of w by COLUMNS tokens; SPLIT blocks of a cluster share its `steps` of 64 * CHUNKS in k."""
    comptime ROWS = 64 * GROUPS
    comptime THREADS = 128 * GROUPS
    comptime OUTPUTS = ROWS // 2 if GATED else ROWS
    comptime W_ELEMS = CHUNKS * ROWS * _BK
    comptime STAGE = CHUNKS * (ROWS + COLUMNS) * _BK
    var smem = external_memory[Scalar[BF16], address_space=AddressSpace.SHARED, alignment=1024]()
    var full = unsafe_stack_allocation[_MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty = unsafe_stack_allocation[_MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var arrived = unsafe_stack_allocation[1, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var rank = UInt32(block_idx.x) % UInt32(SPLIT)
    var output_base = Int32(UInt32(block_idx.x) // UInt32(SPLIT)) * Int32(OUTPUTS)
    var token_base = Int32(block_idx.y) * Int32(COLUMNS)
    var first = steps * rank // UInt32(SPLIT)
    var count = steps * (rank + 1) // UInt32(SPLIT) - first
    var ahead = min(stages, count)
    var warp = warp_id[broadcast=True]()

    @always_inline
    def copy[of_w: Bool](slot: UInt32, step: UInt32) {imm}:
        var to = smem.unsafe_offset(Int(slot * UInt32(STAGE) + UInt32(0 if of_w else W_ELEMS)))
        var landed = full[unsafe_offset=Int(slot)].unsafe_ptr()
        var chunk = Int((first + step) * UInt32(CHUNKS))
        comptime if of_w:
            var descriptor = Pointer(to=w_map.descriptor).unsafe_bitcast[NoneType]()
            cp_async_bulk_tensor_shared_cluster_global(to, descriptor, landed, Index(0, Int(output_base), 0, chunk))
        else:
            var descriptor = Pointer(to=x_map.descriptor).unsafe_bitcast[NoneType]()
            cp_async_bulk_tensor_shared_cluster_global(to, descriptor, landed, Index(0, Int(token_base), chunk))

    if thread_idx.x == THREADS:
        w_map.prefetch_descriptor()
        x_map.prefetch_descriptor()
        for s in range(ahead):
            full[unsafe_offset=Int(s)].init(1)
            empty[unsafe_offset=Int(s)].init(Int32(GROUPS))
        arrived[].init(1)
        comptime if SPLIT > 1:
            arrived[].expect_bytes(Int32(inbox_bytes[COLUMNS, SPLIT, THREADS]()))
        fence_mbarrier_init()
        fence_async_view_proxy()
        # w does not depend on the kernel ahead, and nobody else has to be ready for it.
        for i in range(ahead):
            full[unsafe_offset=Int(i)].expect_bytes(Int32(STAGE * 2))
            copy[True](i, i)
    barrier()
    launch_dependent_grids()
    comptime if SPLIT > 1:
        cluster_arrive()  # the barriers above are ready for the others

    if warp >= 4 * GROUPS:
        if thread_idx.x == THREADS:
            wait_on_dependent_grids()
            for i in range(ahead):
                copy[False](i, i)
            var slot = UInt32(0)
            var phase = UInt32(0)
            for i in range(ahead, count):
                empty[unsafe_offset=Int(slot)].wait(phase)
                full[unsafe_offset=Int(slot)].expect_bytes(Int32(STAGE * 2))
                copy[True](slot, i)
                copy[False](slot, i)
                slot += 1
                if slot == stages:
                    slot = 0
                    phase ^= 1
        comptime if SPLIT > 1:
            cluster_wait()
        return

    # --8<-- [start:loop]
    var acc = SIMD[F32, COLUMNS // 2](0)
    var a = WGMMADescriptor[BF16].create[64, 1, _SW](smem.unsafe_offset(warp // 4 * (64 * _BK)))
    var b = WGMMADescriptor[BF16].create[64, 1, _SW](smem.unsafe_offset(W_ELEMS))
    var slot = UInt32(0)
    var phase = UInt32(0)
    for i in range(count):
        full[unsafe_offset=Int(slot)].wait(phase)
        var at = Int(slot * UInt32(STAGE * 2))
        wgmma_fence_aligned()
        comptime for k in range(4 * CHUNKS):
            comptime AT_A = k // 4 * (ROWS * _BK * 2) + k % 4 * 32
            comptime AT_B = k // 4 * (COLUMNS * _BK * 2) + k % 4 * 32
            acc = wgmma_async[64, COLUMNS, 16, a_type=BF16, b_type=BF16](a + (at + AT_A), b + (at + AT_B), acc)
        wgmma_commit_group_sync()
        # Only of a stage that is filled again must it be known that it has been read.
        if i + stages < count + 1:
            wgmma_wait_group_sync[1]()
            if i > 0 and thread_idx.x % 128 == 0:
                _ = empty[unsafe_offset=Int((slot if slot > 0 else stages) - 1)].arrive()
        slot += 1
        if slot == stages:
            slot = 0
            phase ^= 1
    wgmma_wait_group_sync()
    _pin(acc)
    # --8<-- [end:loop]

    var behind = smem.unsafe_offset(Int(stages * UInt32(STAGE)))  # the ring
    comptime if SPLIT == 1:
        store_tile[has_bias, GATED, ROWS](y, bias, acc, behind, warp, token_base, output_base, m, n)
    else:
        comptime EACH = held_octets[COLUMNS, SPLIT]()
        cluster_wait()  # until all blocks of the cluster have their barriers
        send_shares[COLUMNS, SPLIT, THREADS](behind, arrived, acc, rank)
        # With less than 8 tokens for each some blocks have no share.
        if rank < UInt32(COLUMNS // 8):
            arrived[].wait(0)
            var sums = sum_shares[COLUMNS, SPLIT, THREADS](behind)
            var token = token_base + Int32(rank) * Int32(EACH * 8)
            # What this block's warps sent themselves has arrived: all have read the ring, and its place is free.
            store_tile[has_bias, GATED, ROWS](y, bias, sums, smem, warp, token, output_base, m, n)


def fits_few(n: Int, k: Int) -> Bool:
    """Whether a row of w is whole swizzle atoms, and a row of y whole stores."""
    return k % _BK == 0 and n % 8 == 0


def linear_few[
    has_bias: Bool, GATED: Bool, GROUPS: Int, COLUMNS: Int, SPLIT: Int, CHUNKS: Int
](y: Ptr[BF16], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Launches a block, or SPLIT of them, for each tile; n counts the columns of y, a gated w has 2n rows."""
    comptime ROWS = 64 * GROUPS
    comptime OUTPUTS = ROWS // 2 if GATED else ROWS
    comptime HALVES = 2 if GATED else 1
    comptime STAGE_BYTES = CHUNKS * (ROWS + COLUMNS) * _BK * 2
    comptime BEHIND = inbox_bytes[COLUMNS, SPLIT, 2 * ROWS]() if SPLIT > 1 else COLUMNS * (ROWS + SKEW) * 2
    comptime SMS = ctx.default_device_info.sm_count
    comptime kernel = _few_kernel[has_bias, GATED, GROUPS, COLUMNS, SPLIT, CHUNKS]
    var chunks = k // _BK
    var w_map = _Map(
        create_tma_descriptor[BF16, 4, _SW](
            DeviceBuffer(ctx, w, 1, owning=False),
            Index(chunks, HALVES, n, _BK),
            Index(_BK, n * k, k, 1),
            Index(CHUNKS, HALVES, OUTPUTS, _BK),
        )
    )
    var x_map = _Map(
        create_tma_descriptor[BF16, 3, _SW](
            DeviceBuffer(ctx, x, 1, owning=False), Index(chunks, m, _BK), Index(_BK, k, 1), Index(CHUNKS, COLUMNS, _BK)
        )
    )
    var tiles = ceildiv(n, OUTPUTS)
    var room = _SHARED_BYTES // (1 if tiles * ceildiv(m, COLUMNS) * SPLIT <= SMS else 2)
    var steps = ceildiv(chunks, CHUNKS)
    var stages = min((room - BEHIND) // STAGE_BYTES, _MAX_STAGES, ceildiv(steps, SPLIT))
    var smem = stages * STAGE_BYTES + BEHIND
    ctx.enqueue_function[kernel](
        w_map,
        x_map,
        y,
        bias,
        Int32(m),
        Int32(n),
        UInt32(steps),
        UInt32(stages),
        grid_dim=(tiles * SPLIT, ceildiv(m, COLUMNS)),
        block_dim=2 * ROWS + 32,
        cluster_dim=Dim(SPLIT, 1, 1),
        shared_mem_bytes=smem,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(smem)),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
