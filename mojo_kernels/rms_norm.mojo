# --8<-- [start:header]
"""RMSNorm with the residual add fused in.

Math:      r = round(x + residual);  y = r / sqrt(mean(r^2) + eps) * weight
Shapes:    y [T, H], residual_out [T, H] = x [T, H], residual [T, H], weight [H]
Dtypes:    bfloat16 or float32; sum of squares in float32; r is rounded to the dtype before it is normalised, so that y belongs
           to the residual that the next layer sees
CPU:       parallel over rows; SIMD over H with a scalar tail
GPU:       one thread block per row: one warp up to 2 KB a row, 4 up to 8 KB (but 8 for 97 to 264 rows), else 8; warp sums, then
           one shared-memory pass; x and residual are read once, all loads at once, and stay in registers up to 16 KB a row
Bound:     bytes = 4 T H sizeof(dtype); flops = 5 T H
Limits:    H is any positive number; 16-byte accesses on the GPU when H allows, else one element at a time
Source:    Zhang and Sennrich 2019 (arXiv 1910.07467)
"""
# --8<-- [end:header]

from ._parallel import for_each
from ._prelude import *
from ._rms_norm_cpu import _add_norm_row_cpu
from ._rms_norm_gpu import _add_norm_gpu


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
            _add_norm_row_cpu[dtype](
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
        _add_norm_gpu[dtype](y, residual_out, x, residual, weight, rows, h, eps, ctx)
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
