"""RMSNorm on the CPU: one row, in two passes over it.

Knows nothing of rows beside it: `rms_norm` deals rows to threads.
"""

from ._prelude import *


# --8<-- [start:row_cpu]
@always_inline
def _add_norm_row_cpu[
    dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    weight: Ptr[dtype],
    h: Int,
    eps: Float32,
):
    comptime W = simd_width_of[F32]()
    var squares = SIMD[F32, W](0)
    var i = 0
    while i + W <= h:
        var r = (x.unsafe_load[width=W](i).cast[F32]() + residual.unsafe_load[width=W](i).cast[F32]()).cast[dtype]()
        residual_out.unsafe_store(i, r)
        squares = r.cast[F32]().fma(r.cast[F32](), squares)
        i += W
    var total = squares.reduce_add()
    while i < h:
        var r = (x[unsafe_offset=i].cast[F32]() + residual[unsafe_offset=i].cast[F32]()).cast[dtype]()
        residual_out[unsafe_offset=i] = r
        total += r.cast[F32]() * r.cast[F32]()
        i += 1
    var scale = 1 / sqrt(total / Float32(h) + eps)
    i = 0
    while i + W <= h:
        var r = residual_out.unsafe_load[width=W](i).cast[F32]()
        y.unsafe_store(i, (r * scale * weight.unsafe_load[width=W](i).cast[F32]()).cast[dtype]())
        i += W
    while i < h:
        var r = residual_out[unsafe_offset=i].cast[F32]()
        y[unsafe_offset=i] = (r * scale * weight[unsafe_offset=i].cast[F32]()).cast[dtype]()
        # --8<-- [end:row_cpu]
        i += 1
