"""Chosen rows of two arrays: behind the last attention, what is left to compute is computed for the rows that are asked for.

Math:      a_out[i, :] = a[rows[i], :];  b_out[i, :] = b[rows[i], :]
Shapes:    a_out [R, A], b_out [R, B], a [T, A], b [T, B], rows [R] int32
Dtypes:    bfloat16 or float32, all alike; no arithmetic
CPU:       parallel over rows
GPU:       one thread block for each chosen row, which copies both of its rows in 16-byte vectors
Bound:     bytes = 2 R (A + B) sizeof(dtype); flops = 0
Limits:    row numbers are checked by the caller; 16-byte accesses on the GPU when A and B allow, else one element at a time
Source:    plain gather
"""

from ._parallel import for_each
from ._prelude import *

comptime _THREADS = 128


@always_inline
def _copy_cpu[dtype: DType](to: Ptr[dtype], source: Ptr[dtype], size: Int):
    comptime W = simd_width_of[dtype]()
    var i = 0
    while i + W <= size:
        to.unsafe_store(i, source.unsafe_load[width=W](i))
        i += W
    while i < size:
        to[unsafe_offset=i] = source[unsafe_offset=i]
        i += 1


@always_inline
def _copy_gpu[dtype: DType, VEC: Int](to: Ptr[dtype], source: Ptr[dtype], size: Int):
    comptime ALIGN = VEC * size_of[dtype]()
    var i = thread_idx.x * VEC
    while i < size:
        to.unsafe_store[alignment=ALIGN](i, source.unsafe_load[width=VEC, alignment=ALIGN](i))
        i += _THREADS * VEC


def _take_rows_kernel[
    dtype: DType, VEC: Int
](
    a_out: Ptr[dtype],
    b_out: Ptr[dtype],
    a: Ptr[dtype],
    b: Ptr[dtype],
    rows: Ptr[DType.int32],
    a_size32: Int32,
    b_size32: Int32,
):
    var a_size = Int(a_size32)
    var b_size = Int(b_size32)
    launch_dependent_grids()
    wait_on_dependent_grids()
    var row = Int(rows[unsafe_offset=block_idx.x])
    _copy_gpu[dtype, VEC](a_out.unsafe_offset(block_idx.x * a_size), a.unsafe_offset(row * a_size), a_size)
    _copy_gpu[dtype, VEC](b_out.unsafe_offset(block_idx.x * b_size), b.unsafe_offset(row * b_size), b_size)


@extensibility.register("mili.take_rows")
struct TakeRows:
    """Gathers the same rows of two arrays."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        a_out: OutputTensor[rank=2, ...],
        b_out: OutputTensor[dtype=a_out.dtype, rank=2, ...],
        a: InputTensor[dtype=a_out.dtype, rank=2, ...],
        b: InputTensor[dtype=a_out.dtype, rank=2, ...],
        rows: InputTensor[dtype=DType.int32, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".

        Args:
            a_out: Rows of a [R, A].
            b_out: Rows of b [R, B].
            a: Source [T, A].
            b: Source [T, B].
            rows: Row numbers [R], each below T.
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var count = a_out.dim_size(0)
        if count == 0:
            return
        var to_a = a_out.unsafe_ptr()
        var to_b = b_out.unsafe_ptr()
        var ap = a.unsafe_ptr()
        var bp = b.unsafe_ptr()
        var chosen = rows.unsafe_ptr()
        var a_size = a.dim_size(1)
        var b_size = b.dim_size(1)
        comptime if is_cpu[target]():

            def row(i: Int) {var}:
                var source = Int(chosen[unsafe_offset=i])
                _copy_cpu(to_a.unsafe_offset(i * a_size), ap.unsafe_offset(source * a_size), a_size)
                _copy_cpu(to_b.unsafe_offset(i * b_size), bp.unsafe_offset(source * b_size), b_size)

            for_each(row, count, 2 * count * (a_size + b_size) * size_of[a_out.dtype]())
        elif is_gpu[target]():

            @always_inline
            def launch[VEC: Int]() raises {imm}:
                comptime kernel = _take_rows_kernel[a_out.dtype, VEC]
                ctx.enqueue_function[kernel](
                    to_a,
                    to_b,
                    ap,
                    bp,
                    chosen,
                    Int32(a_size),
                    Int32(b_size),
                    grid_dim=count,
                    block_dim=_THREADS,
                    attributes=pdl_launch_attributes(PDLLevel.ON),
                )

            comptime VEC = 16 // size_of[a_out.dtype]()
            if a_size % VEC == 0 and b_size % VEC == 0:
                launch[VEC]()
            else:
                launch[1]()
        else:
            comptime assert False, "mili.take_rows: unsupported target"
