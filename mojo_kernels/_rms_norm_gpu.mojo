"""RMSNorm on the GPU: a thread block a row, and how many warps it has.

The sum of squares of a row is always made of the same WARPS sums in the same order, whoever makes them: how many warps share
a row changes its speed, not its bits. Knows pointers and sizes only; `rms_norm` has the math and the ops.
"""

from ._prelude import *

comptime WARPS = 8
"""Sums that make up a row's sum of squares on the GPU, and the most warps that share a row."""

comptime KEPT = 4
"""Vectors of a row that a GPU thread keeps in registers; what a longer row has beyond them is read back."""


# --8<-- [start:kernel_gpu]
def _add_norm_kernel[
    dtype: DType, VEC: Int, GROUP: Int
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    weight: Ptr[dtype],
    h32: Int32,
    eps: Float32,
):
    comptime ALIGN = VEC * size_of[dtype]()
    comptime STEP = GROUP * WARP_SIZE * VEC
    comptime SUMS = min(KEPT, WARPS // GROUP)  # of the row's WARPS sums, that one warp makes
    var h = Int(h32)
    var at = thread_idx.x * VEC
    # The gain is a weight: it is fetched before the kernel ahead has finished.
    launch_dependent_grids()
    var gain = Array[SIMD[dtype, VEC], KEPT](fill=0)
    comptime for k in range(KEPT):
        if at + k * STEP < h:
            gain[k] = weight.unsafe_load[width=VEC, alignment=ALIGN](at + k * STEP)
    wait_on_dependent_grids()
    var row = block_idx.x * h
    # All loads of a row are in flight before the first is waited for; a store between them would hold back the next.
    var kept = Array[SIMD[dtype, VEC], KEPT](fill=0)
    var added = Array[SIMD[dtype, VEC], KEPT](fill=0)
    comptime for k in range(KEPT):
        if at + k * STEP < h:
            kept[k] = x.unsafe_load[width=VEC, alignment=ALIGN](row + at + k * STEP)
            added[k] = residual.unsafe_load[width=VEC, alignment=ALIGN](row + at + k * STEP)
    var sums = Array[Float32, SUMS](fill=0)
    comptime for k in range(KEPT):
        kept[k] = (kept[k].cast[F32]() + added[k].cast[F32]()).cast[dtype]()
        var f = kept[k].cast[F32]()
        sums[k % SUMS] += (f * f).reduce_add()
    comptime for k in range(KEPT):
        if at + k * STEP < h:
            residual_out.unsafe_store[alignment=ALIGN](row + at + k * STEP, kept[k])
    # What of a longer row is not kept, the same thread reads back later.
    comptime if GROUP == WARPS:
        var i = at + KEPT * STEP
        while i < h:
            var r = (
                x.unsafe_load[width=VEC, alignment=ALIGN](row + i).cast[F32]()
                + residual.unsafe_load[width=VEC, alignment=ALIGN](row + i).cast[F32]()
            ).cast[dtype]()
            residual_out.unsafe_store[alignment=ALIGN](row + i, r)
            var f = r.cast[F32]()
            sums[0] += (f * f).reduce_add()
            i += STEP

    # Warp w makes the row's sums w, w + GROUP, ...: these and their order are the same whatever the group, and so the bits.
    comptime for m in range(SUMS):
        sums[m] = warp.sum(sums[m])
    var total = Float32(0)
    comptime if GROUP == 1:
        comptime for m in range(SUMS):
            total += sums[m]
    else:
        var partial = unsafe_stack_allocation[WARPS, Float32, address_space=AddressSpace.SHARED]()
        if lane_id() == 0:
            comptime for m in range(SUMS):
                partial[unsafe_offset=warp_id() + m * GROUP] = sums[m]
        barrier()
        comptime for w in range(SUMS * GROUP):
            total += partial[unsafe_offset=w]
    var scale = 1 / sqrt(total / Float32(h) + eps)
    comptime for k in range(KEPT):
        if at + k * STEP < h:
            var normed = kept[k].cast[F32]() * scale * gain[k].cast[F32]()
            y.unsafe_store[alignment=ALIGN](row + at + k * STEP, normed.cast[dtype]())
    comptime if GROUP == WARPS:
        var i = at + KEPT * STEP
        while i < h:
            var r = residual_out.unsafe_load[width=VEC, alignment=ALIGN](row + i).cast[F32]()
            var w = weight.unsafe_load[width=VEC, alignment=ALIGN](i).cast[F32]()
            y.unsafe_store[alignment=ALIGN](row + i, (r * scale * w).cast[dtype]())
            i += STEP
# --8<-- [end:kernel_gpu]


def _add_norm_gpu[
    dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    weight: Ptr[dtype],
    num_rows: Int,
    h: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    # --8<-- [start:launch_gpu]
    @always_inline
    def launch[VEC: Int, GROUP: Int]() raises {imm}:
        comptime kernel = _add_norm_kernel[dtype, VEC, GROUP]
        ctx.enqueue_function[kernel](
            y,
            residual_out,
            x,
            residual,
            weight,
            Int32(h),
            eps,
            grid_dim=num_rows,
            block_dim=GROUP * WARP_SIZE,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    comptime VEC = 16 // size_of[dtype]()
    comptime REACH = KEPT * WARP_SIZE * VEC  # what a warp keeps of a row
    if h % VEC != 0:
        launch[1, WARPS]()
        return
    if h <= REACH:
        launch[VEC, 1]()
        return
    # About a row or two for each multiprocessor: smaller blocks would crowd some of them and leave others idle.
    var uneven = 96 < num_rows <= 264
    if h <= 4 * REACH and not uneven:
        launch[VEC, 4]()
        return
    launch[VEC, WARPS]()
    # --8<-- [end:launch_gpu]
