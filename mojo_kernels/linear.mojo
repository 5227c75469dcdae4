"""Matrix product of activations with a weight stored output row by output row.

Math:      y[m, n] = sum_k x[m, k] w[n, k] (+ bias[n])
Shapes:    y [M, N], x [M, K], bias [N]; w: CPU [ceil(N/32), K*32] packed panels, GPU [N, K] as in the checkpoint
Dtypes:    x, w, bias bfloat16 or float32; y the same or float32 (logits); float32 accumulation, one rounding at the store
CPU:       `_linear_cpu`: parallel over panels of 32 outputs, register tile of 12 rows, AVX-512 bf16 dot where the CPU has it
GPU:       `_linear_gpu`: weight streaming for few rows, TMA and wgmma for many; with batch_invariant the latter for all, so that
           sums do not depend on M there either
Bound:     bytes = (N K + M K) sizeof(dtype) + M N sizeof(y); flops = 2 M N K
Limits:    K is even for bfloat16 on the CPU (two k share a lane)
Source:    panel packing and register tiles: Goto and van de Geijn 2008; here k is never split, so that sums do not depend on M
"""

from ._linear_cpu import linear_cpu
from ._linear_gpu import linear_gpu
from ._linear_skinny_gpu import fits_skinny, linear_skinny
from ._prelude import *


comptime _AHEAD_ROWS = 4  # with more, the fetching is in the way of what attention reads


@always_inline
def _linear[
    target: StaticString, has_bias: Bool, INVARIANT: Bool, dtype: DType, out_dtype: DType
](
    y: Ptr[out_dtype], x: Ptr[dtype], w: Ptr[dtype], bias: Ptr[dtype], m: Int, n: Int, k: Int, ctx: DeviceContext
) raises:
    """Makes y [m, n]; ops that make their own x call it too. `bias` is not read without `has_bias`."""
    if m == 0:
        return
    comptime if is_cpu[target]():
        if dtype == BF16 and k % 2 != 0:
            raise Error("mili.linear: K must be even for bfloat16, got ", k)
        linear_cpu[dtype, out_dtype, has_bias](y, x, w, bias, m, n, k)
    elif is_gpu[target]():
        linear_gpu[dtype, out_dtype, has_bias, INVARIANT](y, x, w, bias, m, n, k, ctx)
    else:
        comptime assert False, "mili.linear: unsupported target"


@always_inline
def _linear_ahead[
    target: StaticString, INVARIANT: Bool, dtype: DType, out_dtype: DType
](
    y: Ptr[out_dtype],
    x: Ptr[dtype],
    w: Ptr[dtype],
    ahead: Ptr[dtype],
    ahead_size: Int,
    later: Ptr[dtype],
    later_size: Int,
    m: Int,
    n: Int,
    k: Int,
    ctx: DeviceContext,
) raises:
    """Makes y [m, n], for an op that reads two more weights later: with few rows of a small w it fetches them into the L2 cache."""
    comptime if is_gpu[target]() and dtype == BF16 and not INVARIANT:
        if 0 < m <= _AHEAD_ROWS and fits_skinny(m, n, k):
            comptime P = Ptr[BF16]
            var weight = rebind[P](w)
            linear_skinny[out_dtype, False](
                y, rebind[P](x), weight, weight, m, n, k, rebind[P](ahead), ahead_size, rebind[P](later), later_size, ctx
            )
            return
    _linear[target, False, INVARIANT](y, x, w, w, m, n, k, ctx)


@extensibility.register("mili.linear")
struct Linear:
    """Matrix product without bias."""

    @staticmethod
    def execute[
        target: StaticString, batch_invariant: Bool
    ](
        y: OutputTensor[rank=2, ...],
        x: InputTensor[rank=2, ...],
        w: InputTensor[dtype=x.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            batch_invariant: Whether a row's bits may not depend on M.

        Args:
            y: Output [M, N].
            x: Activations [M, K].
            w: Weight, packed on the CPU.
            ctx: Device context.

        Raises:
            Error: If K is odd for bfloat16 on the CPU, or a launch fails.
        """
        var wp = w.unsafe_ptr()
        _linear[target, False, batch_invariant](
            y.unsafe_ptr(), x.unsafe_ptr(), wp, wp, x.dim_size(0), y.dim_size(1), x.dim_size(1), ctx
        )


@extensibility.register("mili.linear_bias")
struct LinearBias:
    """Matrix product with a bias per output."""

    @staticmethod
    def execute[
        target: StaticString, batch_invariant: Bool
    ](
        y: OutputTensor[rank=2, ...],
        x: InputTensor[rank=2, ...],
        w: InputTensor[dtype=x.dtype, rank=2, ...],
        bias: InputTensor[dtype=x.dtype, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            batch_invariant: Whether a row's bits may not depend on M.

        Args:
            y: Output [M, N].
            x: Activations [M, K].
            w: Weight, packed on the CPU.
            bias: Added to each row [N].
            ctx: Device context.

        Raises:
            Error: If K is odd for bfloat16 on the CPU, or a launch fails.
        """
        _linear[target, True, batch_invariant](
            y.unsafe_ptr(),
            x.unsafe_ptr(),
            w.unsafe_ptr(),
            bias.unsafe_ptr(),
            x.dim_size(0),
            y.dim_size(1),
            x.dim_size(1),
            ctx,
        )
