# --8<-- [start:header]
"""RMSNorm with the residual add fused in, for all rows or for chosen rows.

Math:      r = round(x + residual);  y = r / sqrt(mean(r^2) + eps) * weight
Shapes:    add_rms_norm:      y [T, H], residual_out [T, H] = x [T, H], residual [T, H], weight [H]
           add_rms_norm_rows: y [R, H] = x [T, H], residual [T, H], rows [R] int32, weight [H]; only rows rows[i] are read
Dtypes:    bfloat16 or float32; sum of squares in float32; r is rounded to the dtype before it is normalised, so that y belongs
           to the residual that the next layer sees
CPU:       parallel over rows; SIMD over H with a scalar tail
GPU:       one thread block per row: one warp up to 2 KB a row, 4 up to 8 KB (but 8 for 97 to 264 rows), else 8; warp sums, then
           one shared-memory pass; x and residual are read once, all loads at once, and stay in registers up to 16 KB a row
Bound:     bytes = 4 R H sizeof(dtype) (3 for _rows); flops = 5 R H
Limits:    H is any positive number; 16-byte accesses on the GPU when H allows, else one element at a time
Source:    Zhang and Sennrich 2019 (arXiv 1910.07467)
"""
# --8<-- [end:header]

from ._parallel import for_each
from ._prelude import *

comptime WARPS = 8
"""Sums that make up a row's sum of squares on the GPU, and the most warps that share a row."""

comptime KEPT = 4
"""Vectors of a row that a GPU thread keeps in registers; what a longer row has beyond them is read back."""


# --8<-- [start:row_cpu]
@always_inline
def _add_norm_row_cpu[
    dtype: DType, store_residual: Bool
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    weight: Ptr[dtype],
    h: Int,
    eps: Float32,
):
    """One row. y holds r between the two passes when the residual itself is not stored."""
    comptime W = simd_width_of[F32]()
    var kept = residual_out if store_residual else y
    var squares = SIMD[F32, W](0)
    var i = 0
    while i + W <= h:
        var r = (x.unsafe_load[width=W](i).cast[F32]() + residual.unsafe_load[width=W](i).cast[F32]()).cast[dtype]()
        kept.unsafe_store(i, r)
        squares = r.cast[F32]().fma(r.cast[F32](), squares)
        i += W
    var total = squares.reduce_add()
    while i < h:
        var r = (x[unsafe_offset=i].cast[F32]() + residual[unsafe_offset=i].cast[F32]()).cast[dtype]()
        kept[unsafe_offset=i] = r
        total += r.cast[F32]() * r.cast[F32]()
        i += 1
    var scale = 1 / sqrt(total / Float32(h) + eps)
    i = 0
    while i + W <= h:
        var r = kept.unsafe_load[width=W](i).cast[F32]()
        y.unsafe_store(i, (r * scale * weight.unsafe_load[width=W](i).cast[F32]()).cast[dtype]())
        i += W
    while i < h:
        y[unsafe_offset=i] = (kept[unsafe_offset=i].cast[F32]() * scale * weight[unsafe_offset=i].cast[F32]()).cast[
            dtype
        ]()
        # --8<-- [end:row_cpu]
        i += 1


# --8<-- [start:kernel_gpu]
def _add_norm_kernel[
    dtype: DType, VEC: Int, GROUP: Int, chosen_rows: Bool
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    rows: Ptr[DType.int32],
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
    var out = block_idx.x * h
    var source = out
    comptime if chosen_rows:
        source = Int(rows[unsafe_offset=block_idx.x]) * h
    # All loads of a row are in flight before the first is waited for; a store between them would hold back the next.
    var kept = Array[SIMD[dtype, VEC], KEPT](fill=0)
    var added = Array[SIMD[dtype, VEC], KEPT](fill=0)
    comptime for k in range(KEPT):
        if at + k * STEP < h:
            kept[k] = x.unsafe_load[width=VEC, alignment=ALIGN](source + at + k * STEP)
            added[k] = residual.unsafe_load[width=VEC, alignment=ALIGN](source + at + k * STEP)
    var sums = Array[Float32, SUMS](fill=0)
    comptime for k in range(KEPT):
        kept[k] = (kept[k].cast[F32]() + added[k].cast[F32]()).cast[dtype]()
        var f = kept[k].cast[F32]()
        sums[k % SUMS] += (f * f).reduce_add()
    comptime if not chosen_rows:
        comptime for k in range(KEPT):
            if at + k * STEP < h:
                residual_out.unsafe_store[alignment=ALIGN](out + at + k * STEP, kept[k])
    # What of a longer row is not kept, the same thread reads back later; for chosen rows y holds it until then.
    var stored = y if chosen_rows else residual_out
    comptime if GROUP == WARPS:
        var i = at + KEPT * STEP
        while i < h:
            var r = (
                x.unsafe_load[width=VEC, alignment=ALIGN](source + i).cast[F32]()
                + residual.unsafe_load[width=VEC, alignment=ALIGN](source + i).cast[F32]()
            ).cast[dtype]()
            stored.unsafe_store[alignment=ALIGN](out + i, r)
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
            y.unsafe_store[alignment=ALIGN](out + at + k * STEP, normed.cast[dtype]())
    comptime if GROUP == WARPS:
        var i = at + KEPT * STEP
        while i < h:
            var r = stored.unsafe_load[width=VEC, alignment=ALIGN](out + i).cast[F32]()
            var w = weight.unsafe_load[width=VEC, alignment=ALIGN](i).cast[F32]()
            y.unsafe_store[alignment=ALIGN](out + i, (r * scale * w).cast[dtype]())
            i += STEP
# --8<-- [end:kernel_gpu]


def _add_norm_gpu[
    dtype: DType, chosen_rows: Bool
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    rows: Ptr[DType.int32],
    weight: Ptr[dtype],
    num_rows: Int,
    h: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    # --8<-- [start:launch_gpu]
    @always_inline
    def launch[VEC: Int, GROUP: Int]() raises {imm}:
        comptime kernel = _add_norm_kernel[dtype, VEC, GROUP, chosen_rows]
        ctx.enqueue_function[kernel](
            y,
            residual_out,
            x,
            residual,
            rows,
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
    comptime if not chosen_rows:
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


@always_inline
def _add_rms_norm[
    target: StaticString, dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    weight: Ptr[dtype],
    rows: Int,
    h: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """Adds and normalises all rows; ops that go on with y call it too."""
    if rows == 0:
        return
    # --8<-- [start:dispatch]
    comptime if is_cpu[target]():

        def row(t: Int) {var}:
            var at = t * h
            _add_norm_row_cpu[dtype, True](
                y.unsafe_offset(at),
                residual_out.unsafe_offset(at),
                x.unsafe_offset(at),
                residual.unsafe_offset(at),
                weight,
                h,
                eps,
            )

        for_each(row, rows, 4 * rows * h * size_of[dtype]())
    elif is_gpu[target]():
        var unused = y.unsafe_bitcast[Int32]()
        _add_norm_gpu[dtype, False](y, residual_out, x, residual, unused, weight, rows, h, eps, ctx)
    else:
        comptime assert False, "mili.add_rms_norm: unsupported target"
    # --8<-- [end:dispatch]


# --8<-- [start:register]
@extensibility.register("mili.add_rms_norm")
struct AddRmsNorm:
    """Adds x to the residual stream and normalises the sum."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32
    ](
        y: OutputTensor[rank=2, ...],
        residual_out: OutputTensor[dtype=y.dtype, rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        weight: InputTensor[dtype=y.dtype, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        # --8<-- [end:register]
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.

        Args:
            y: Normalised rows [T, H].
            residual_out: Sum x + residual [T, H].
            x: Output of the previous block [T, H].
            residual: Residual stream [T, H].
            weight: Gain [H].
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        _add_rms_norm[target](
            y.unsafe_ptr(),
            residual_out.unsafe_ptr(),
            x.unsafe_ptr(),
            residual.unsafe_ptr(),
            weight.unsafe_ptr(),
            y.dim_size(0),
            y.dim_size(1),
            eps,
            ctx,
        )


@extensibility.register("mili.add_rms_norm_rows")
struct AddRmsNormRows:
    """Adds and normalises chosen rows only: the last norm, before the LM head."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32
    ](
        y: OutputTensor[rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        weight: InputTensor[dtype=y.dtype, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.

        Args:
            y: Normalised rows [R, H].
            x: Output of the last block [T, H].
            residual: Residual stream [T, H].
            rows: Row numbers [R], each below T.
            weight: Gain [H].
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var num_rows = y.dim_size(0)
        var h = y.dim_size(1)
        if num_rows == 0:
            return
        var yp = y.unsafe_ptr()
        var xp = x.unsafe_ptr()
        var rp = residual.unsafe_ptr()
        var ip = rows.unsafe_ptr()
        var wp = weight.unsafe_ptr()
        comptime if is_cpu[target]():

            def row(i: Int) {var}:
                var at = Int(ip[unsafe_offset=i]) * h
                var out = yp.unsafe_offset(i * h)
                _add_norm_row_cpu[y.dtype, False](out, out, xp.unsafe_offset(at), rp.unsafe_offset(at), wp, h, eps)

            for_each(row, num_rows, 4 * num_rows * h * size_of[y.dtype]())
        elif is_gpu[target]():
            _add_norm_gpu[y.dtype, True](yp, yp, xp, rp, ip, wp, num_rows, h, eps, ctx)
        else:
            comptime assert False, "mili.add_rms_norm_rows: unsupported target"
