"""Tensor-core path of `mili.linear` for Hopper: TMA copies into a ring of shared-memory stages, wgmma out of it.

One warp issues the copies (producer), one or two warpgroups multiply (consumers); two mbarriers a stage say full and
empty. Operand A supplies the 64 rows a wgmma takes per warpgroup, operand B its 32 to 256 columns. With many tokens A
is x and B is w; with few tokens they swap, so that only the tokens are padded. Rows, columns and k past the end are
zero-filled by the copy engine and guarded at the store. A gated product (`GATED`) puts as many gate rows as up rows of w
into its tile, from two copies, and stores silu(gate) * up; of its widest tile, three idle warps do that. The blocks of a
cluster of SHARE take neighbouring tiles of A and the same tile of B, of which each copies its share to all of them.
"""

from ._linear_wgmma_hand_gpu import HAND_BYTES, finish_tiles, hand_over, init_hands
from ._linear_wgmma_store_gpu import PAD, gate, store_rows, store_swapped
from ._linear_wgmma_walk_gpu import tile_origin
from ._prelude import *
from layout import TileTensor, row_major, stack_allocation
from layout.coord import Coord, coord
from layout.tensor_core_async import TensorCoreAsync, tile_layout_k_major_typed, warpgroup_fence
from layout.tma_async import SharedMemBarrier, TMATensorTile, create_tensor_tile
from max.gpu import MAX_THREADS_PER_BLOCK_METADATA, cluster_sync, grid_dim
from max.gpu.host import Dim, FuncAttribute
from max.gpu.host.nvidia.tma import TensorMapSwizzle
from max.gpu.intrinsics import warpgroup_reg_alloc, warpgroup_reg_dealloc
from max.gpu.memory import external_memory, fence_mbarrier_init
from max.gpu.primitives.grid_controls import PDLLevel, launch_dependent_grids
from max.gpu.primitives.grid_controls import pdl_launch_attributes, wait_on_dependent_grids
from std.utils.index import Index
from std.utils.static_tuple import StaticTuple

comptime BK = 64  # 64 bfloat16 = 128 bytes = one row of the 128-byte swizzle atom
comptime SW = TensorMapSwizzle.SWIZZLE_128B
comptime MAX_STAGES = 16

# Rows that one copy brings: a gate and its up projection are two copies, and each block of a cluster brings a share of B.
comptime _A_BOX[GATED: Bool, SWAP: Bool, GROUPS: Int] = 64 * GROUPS // (2 if GATED and SWAP else 1)
comptime _B_BOX[GATED: Bool, SWAP: Bool, COLUMNS: Int, SHARE: Int] = COLUMNS // max(SHARE, 2 if GATED and not SWAP else 1)
comptime _Tma[ROWS: Int] = TMATensorTile[BF16, coord[ROWS, BK], coord[ROWS, BK]]

# Two warpgroups with 256 columns hold 128 sums a thread: a whole producer warpgroup gives its registers up for them.
comptime _WIDE[GROUPS: Int, COLUMNS: Int] = GROUPS == 2 and COLUMNS == 256
comptime _HANDED[GATED: Bool, SWAP: Bool, GROUPS: Int, COLUMNS: Int] = GATED and not SWAP and _WIDE[GROUPS, COLUMNS]
comptime _THREADS[GROUPS: Int, COLUMNS: Int] = 128 * GROUPS + (128 if _WIDE[GROUPS, COLUMNS] else 32)


@__llvm_arg_metadata(a_tma, `nvvm.grid_constant`)
@__llvm_arg_metadata(b_tma, `nvvm.grid_constant`)
@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](Int32(_THREADS[GROUPS, COLUMNS])))
def _wgmma_kernel[
    out_dtype: DType, has_bias: Bool, GATED: Bool, SWAP: Bool, GROUPS: Int, COLUMNS: Int, SHARE: Int
](
    a_tma: _Tma[_A_BOX[GATED, SWAP, GROUPS]],
    b_tma: _Tma[_B_BOX[GATED, SWAP, COLUMNS, SHARE]],
    y: Ptr[out_dtype],
    bias: Ptr[BF16],
    m32: Int32,
    n32: Int32,
    k32: Int32,
    stages32: Int32,
):
    """Blocks walk over tiles of 64*GROUPS rows of A by COLUMNS of B."""
    comptime ROWS = 64 * GROUPS
    comptime OUTPUTS = ROWS if SWAP else COLUMNS
    comptime HANDED = _HANDED[GATED, SWAP, GROUPS, COLUMNS]
    comptime A_ELEMS = ROWS * BK
    comptime STAGE_ELEMS = (ROWS + COLUMNS) * BK
    comptime A_BOX = _A_BOX[GATED, SWAP, GROUPS]
    comptime B_BOX = _B_BOX[GATED, SWAP, COLUMNS, SHARE]
    comptime B_STEP = COLUMNS // (2 if GATED and not SWAP else 1)  # rows of w, or tokens, from tile to tile
    comptime A_LAYOUT = tile_layout_k_major_typed[BF16, A_BOX, BK, SW]
    comptime B_BOX_LAYOUT = tile_layout_k_major_typed[BF16, B_BOX, BK, SW]
    comptime B_LAYOUT = tile_layout_k_major_typed[BF16, COLUMNS, BK, SW]
    comptime GROUP_LAYOUT = tile_layout_k_major_typed[BF16, 64, BK, SW]
    var smem = external_memory[Scalar[BF16], address_space=AddressSpace.SHARED, alignment=1024]()
    var full = unsafe_stack_allocation[MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var empty = unsafe_stack_allocation[MAX_STAGES, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var hands = unsafe_stack_allocation[4, SharedMemBarrier, alignment=8, address_space=AddressSpace.SHARED]()
    var M = Int(m32)
    var N = Int(n32)
    var stages = Int(stages32)
    var rank = block_idx.x % SHARE
    var behind = smem.unsafe_offset(stages * STAGE_ELEMS).unsafe_bitcast[Float32]()  # the ring
    var k_count = ceildiv(Int(k32), BK)
    # The blocks that share a tile of B take neighbouring tiles of A.
    var a_tiles = ceildiv(N if SWAP else M, A_BOX * SHARE)
    var b_tiles = ceildiv(M if SWAP else N, B_STEP)
    var first = block_idx.x // SHARE
    var stride = grid_dim.x // SHARE

    if thread_idx.x == 0:
        for s in range(stages):
            full[unsafe_offset=s].init(1)
            empty[unsafe_offset=s].init(Int32(GROUPS * SHARE))
        comptime if HANDED:
            init_hands(hands)
        fence_mbarrier_init()
    comptime if SHARE > 1:
        cluster_sync()
    else:
        barrier()
    launch_dependent_grids()

    comptime origin = tile_origin[SHARE, A_BOX, B_STEP]
    if warp_id() >= 4 * GROUPS:
        comptime if _WIDE[GROUPS, COLUMNS]:
            warpgroup_reg_dealloc[88 if HANDED else 24]()
        if thread_idx.x == 128 * GROUPS:
            a_tma.prefetch_descriptor()
            b_tma.prefetch_descriptor()

            @always_inline
            def copy[a: Bool](slot: Int, k: Int, row: Int) {imm}:
                var stage = smem.unsafe_offset(slot * STAGE_ELEMS)
                # A gate's up projection lies N rows further down.
                comptime if a:
                    comptime for part in range(ROWS // A_BOX):
                        var to = TileTensor(stage.unsafe_offset(part * A_BOX * BK), A_LAYOUT)
                        a_tma.async_copy(to, full[unsafe_offset=slot], (k, row + part * N))
                else:
                    comptime if SHARE == 1:
                        comptime for part in range(COLUMNS // B_BOX):
                            var to = TileTensor(stage.unsafe_offset(A_ELEMS + part * B_BOX * BK), B_BOX_LAYOUT)
                            b_tma.async_copy(to, full[unsafe_offset=slot], (k, row + part * N))
                    else:
                        var at = rank * B_BOX
                        var to = TileTensor(stage.unsafe_offset(A_ELEMS + at * BK), B_BOX_LAYOUT)
                        var from_ = (k, row + at // B_STEP * N + at % B_STEP)
                        b_tma.async_multicast_load(to, full[unsafe_offset=slot], from_, UInt16((1 << SHARE) - 1))

            # w does not depend on the kernel ahead: its first stages are under way before that one ends.
            var ahead = min(stages, k_count)
            var start = origin(first, a_tiles, b_tiles, rank)
            for i in range(ahead):
                full[unsafe_offset=i].expect_bytes(Int32(STAGE_ELEMS * 2))
                copy[SWAP](i, i * BK, start[0] if SWAP else start[1])
            wait_on_dependent_grids()
            for i in range(ahead):
                copy[not SWAP](i, i * BK, start[1] if SWAP else start[0])
            var slot = ahead % stages
            var turn = ahead // stages
            var i = ahead
            for tile in range(first, a_tiles * b_tiles, stride):
                var at = origin(tile, a_tiles, b_tiles, rank)
                while i < k_count:
                    if turn > 0:
                        empty[unsafe_offset=slot].wait(UInt32((turn - 1) & 1))
                    full[unsafe_offset=slot].expect_bytes(Int32(STAGE_ELEMS * 2))
                    copy[True](slot, i * BK, at[0])
                    copy[False](slot, i * BK, at[1])
                    i += 1
                    slot += 1
                    if slot == stages:
                        slot = 0
                        turn += 1
                i = 0
        comptime if HANDED:
            if warp_id() > 4 * GROUPS:
                wait_on_dependent_grids()
                finish_tiles[SHARE](rebind[Ptr[BF16]](y), behind, hands, first, stride, a_tiles, b_tiles, rank, M, N)
        comptime if SHARE > 1:
            cluster_sync()  # blocks of the cluster still copy into this one's ring, and count on its barriers
    else:
        comptime if _WIDE[GROUPS, COLUMNS]:
            warpgroup_reg_alloc[208 if HANDED else 240]()
        var op = TensorCoreAsync[
            DType.float32, BF16, BF16, Index(64, COLUMNS, 16), a_swizzle=SW, b_swizzle=SW, transpose_b=True
        ]()
        var acc = stack_allocation[DType.float32, address_space=AddressSpace.LOCAL](row_major[1, COLUMNS // 2]())
        var group = warp_id() // 4
        # Row of A and column of B (within the tile) of this thread's first accumulator.
        var row = warp_id() * 16 + lane_id() // 4
        var column = (lane_id() % 4) * 2
        var slot = 0
        var phase = UInt32(0)
        var turn = UInt32(0)

        @always_inline
        def release(slot: Int) {imm}:
            comptime if SHARE == 1:
                if thread_idx.x % 128 == 0:
                    _ = empty[unsafe_offset=slot].arrive()
            else:
                if thread_idx.x % 128 < SHARE:
                    empty[unsafe_offset=slot].arrive_cluster(UInt32(thread_idx.x % 128))

        for tile in range(first, a_tiles * b_tiles, stride):
            _ = acc.fill(0.0)
            var before = 0
            for i in range(k_count):
                full[unsafe_offset=slot].wait(phase)
                var stage = smem.unsafe_offset(slot * STAGE_ELEMS)
                warpgroup_fence(acc)
                op.arrive()
                op.wgmma(
                    TileTensor(stage.unsafe_offset(group * (64 * BK)), GROUP_LAYOUT),
                    TileTensor(stage.unsafe_offset(A_ELEMS), B_LAYOUT),
                    acc,
                )
                op.commit_group()
                warpgroup_fence(acc)
                # One step stays in flight; the stage of the step before it has been read.
                op.wait_group[1]()
                if i > 0:
                    release(before)
                before = slot
                slot += 1
                if slot == stages:
                    slot = 0
                    phase ^= 1
            op.wait_group()
            warpgroup_fence(acc)
            if k_count > 0:
                release(before)
            var at = origin(tile, a_tiles, b_tiles, rank)
            comptime if HANDED:
                hand_over(acc, behind, hands, group, turn)
                turn += 1
            elif SWAP:
                # Behind a block's only tile the ring is free.
                var free = behind if stride < a_tiles * b_tiles else smem.unsafe_bitcast[Float32]()
                store_swapped[out_dtype, has_bias, GATED, COLUMNS, OUTPUTS](
                    y, bias, acc, free, row, column, at[1], at[0], M, N
                )
            elif GATED:
                gate[COLUMNS](acc)
                store_rows[out_dtype, False, COLUMNS // 2](y, bias, acc, row, column, at[0], at[1], M, N)
            else:
                store_rows[out_dtype, has_bias, COLUMNS](y, bias, acc, row, column, at[0], at[1], M, N)
        comptime if SHARE > 1:
            cluster_sync()


def linear_wgmma[
    out_dtype: DType, has_bias: Bool, GATED: Bool, SWAP: Bool, GROUPS: Int, COLUMNS: Int, SHARE: Int = 1
](
    y: Ptr[out_dtype],
    x: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    stages: Int,
    max_blocks: Int,
    ctx: DeviceContext,
) raises:
    """Launches at most `max_blocks` blocks, in clusters of SHARE. A gated w has 2n rows."""
    comptime ROWS = 64 * GROUPS
    comptime kernel = _wgmma_kernel[out_dtype, has_bias, GATED, SWAP, GROUPS, COLUMNS, SHARE]
    comptime A_BOX = _A_BOX[GATED, SWAP, GROUPS]
    comptime B_BOX = _B_BOX[GATED, SWAP, COLUMNS, SHARE]
    var w_rows = 2 * n if GATED else n
    var a = TileTensor(w if SWAP else x, row_major(Coord(w_rows if SWAP else m, k)))
    var b = TileTensor(x if SWAP else w, row_major(Coord(m if SWAP else w_rows, k)))
    var a_tma = create_tensor_tile[coord[A_BOX, BK], swizzle_mode=SW](ctx, a)
    var b_tma = create_tensor_tile[coord[B_BOX, BK], swizzle_mode=SW](ctx, b)
    var tiles = ceildiv(n if SWAP else m, A_BOX * SHARE) * ceildiv(m if SWAP else n, COLUMNS // (2 if GATED and not SWAP else 1))
    # Of a swapped tile's own memory: behind the ring when the block goes on to another tile, else instead of it.
    var ring = stages * (ROWS + COLUMNS) * BK * 2
    var tile = COLUMNS * (ROWS + PAD) * 4 if SWAP else 0
    var smem = ring + tile if tiles > max_blocks else max(ring, tile)
    comptime if _HANDED[GATED, SWAP, GROUPS, COLUMNS]:
        smem += HAND_BYTES
    ctx.enqueue_function[kernel](
        a_tma,
        b_tma,
        y,
        bias,
        Int32(m),
        Int32(n),
        Int32(k),
        Int32(stages),
        grid_dim=min(tiles, max_blocks // SHARE) * SHARE,
        block_dim=_THREADS[GROUPS, COLUMNS],
        cluster_dim=Dim(SHARE),
        shared_mem_bytes=smem,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(smem)),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
