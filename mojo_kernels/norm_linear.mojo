"""A matrix product of normed activations: the residual add, the RMSNorm and the product behind it in one op.

Math:      r = round(x + residual);  h = round(r / sqrt(mean(r^2) + eps) * gain)
           norm_linear:          y = h w^T (+ bias)
           norm_linear_silu_mul: y = silu(h wg^T) * (h wu^T), w = [wg; wu]; both products are rounded before the SiLU
Shapes:    residual_out [T, H] = x [T, H], residual [T, H], gain [H]; normed [T, H] holds h where it is not kept on chip
           norm_linear:          y [T, N], w as for `linear` with N rows, bias [N]
           norm_linear_silu_mul: y [T, I], w as for `linear` with 2I rows; gate_up [T, 2I] holds the products before the
           SiLU where that is a step of its own
Dtypes:    bfloat16 or float32, as `add_rms_norm`, `linear` and `silu_mul`, whose every rounding is kept
CPU:       those three, one after the other
GPU:       up to 4 rows in bfloat16 and a large weight: one kernel that streams w, `_linear_stream_gpu`, the norm inside it too
           while T H is small (`fits_held`); otherwise the norm, then the product, `_linear_gpu`, for the second op with the SiLU
           inside. float32: as on the CPU
Bound:     bytes = (N H + 3 T H + T N) sizeof(dtype); flops = 2 T N H
Limits:    those of `linear`; residual_out is not residual, which every thread block reads
"""

from ._linear_gpu import gated_linear_gpu
from ._linear_stream_gpu import fits_held, fits_stream, linear_stream
from ._linear_stream_kernel_gpu import DIRECT, NORM
from ._prelude import *
from .linear import _linear
from .rms_norm import _add_rms_norm
from .silu_mul import _silu_mul_rows


@always_inline
def _stream[
    has_bias: Bool, INPUT: Int, GATED: Bool, dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    gain: Ptr[dtype],
    w: Ptr[dtype],
    bias: Ptr[dtype],
    m: Int,
    n: Int,
    k: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    comptime P = Ptr[BF16]
    linear_stream[BF16, has_bias, INPUT, GATED](
        rebind[P](y),
        rebind[P](residual_out),
        rebind[P](x),
        rebind[P](residual),
        rebind[P](gain),
        rebind[P](w),
        rebind[P](bias),
        m,
        n,
        k,
        eps,
        ctx,
    )


@always_inline
def _norm_linear[
    target: StaticString, has_bias: Bool, INVARIANT: Bool, dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    normed: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    gain: Ptr[dtype],
    w: Ptr[dtype],
    bias: Ptr[dtype],
    m: Int,
    n: Int,
    k: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    if m == 0:
        return
    comptime if is_gpu[target]() and dtype == BF16 and not INVARIANT:
        if fits_stream(m, n, k) and fits_held(m, k):
            _stream[has_bias, NORM, False](y, residual_out, x, residual, gain, w, bias, m, n, k, eps, ctx)
            return
    _add_rms_norm[target](normed, residual_out, x, residual, gain, m, k, eps, ctx)
    _linear[target, has_bias, INVARIANT](y, normed, w, bias, m, n, k, ctx)


@always_inline
def _norm_linear_silu_mul[
    target: StaticString, INVARIANT: Bool, dtype: DType
](
    y: Ptr[dtype],
    residual_out: Ptr[dtype],
    normed: Ptr[dtype],
    gate_up: Ptr[dtype],
    x: Ptr[dtype],
    residual: Ptr[dtype],
    gain: Ptr[dtype],
    w: Ptr[dtype],
    m: Int,
    n: Int,
    k: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """Makes y [m, n] of w with 2n rows; an op that makes its own x calls it too."""
    if m == 0:
        return
    comptime if is_gpu[target]() and dtype == BF16 and not INVARIANT:
        if fits_stream(m, 2 * n, k) and fits_held(m, k):
            _stream[False, NORM, True](y, residual_out, x, residual, gain, w, w, m, n, k, eps, ctx)
            return
    _add_rms_norm[target](normed, residual_out, x, residual, gain, m, k, eps, ctx)
    comptime if is_gpu[target]() and dtype == BF16:
        comptime if not INVARIANT:
            if fits_stream(m, 2 * n, k):
                _stream[False, DIRECT, True](y, residual_out, normed, residual, gain, w, w, m, n, k, eps, ctx)
                return
        gated_linear_gpu[dtype, INVARIANT](y, normed, w, m, n, k, ctx)
        return
    _linear[target, False, INVARIANT](gate_up, normed, w, w, m, 2 * n, k, ctx)
    _silu_mul_rows[target](y, gate_up, m, n, ctx)


@extensibility.register("mili.norm_linear")
struct NormLinear:
    """Adds x to the residual stream, normalises the sum and multiplies it with a weight."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32, batch_invariant: Bool
    ](
        y: OutputTensor[rank=2, ...],
        residual_out: OutputTensor[dtype=y.dtype, rank=2, ...],
        normed: OutputTensor[dtype=y.dtype, rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        gain: InputTensor[dtype=y.dtype, rank=1, ...],
        w: InputTensor[dtype=y.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.
            batch_invariant: Whether a row's bits may not depend on T.

        Args:
            y: Product [T, N].
            residual_out: Sum x + residual [T, H].
            normed: Scratch [T, H].
            x: Output of the previous block [T, H].
            residual: Residual stream [T, H].
            gain: Gain of the norm [H].
            w: Weight, packed on the CPU.
            ctx: Device context.

        Raises:
            Error: If H is odd for bfloat16 on the CPU, or a launch fails.
        """
        var wp = w.unsafe_ptr()
        _norm_linear[target, False, batch_invariant](
            y.unsafe_ptr(),
            residual_out.unsafe_ptr(),
            normed.unsafe_ptr(),
            x.unsafe_ptr(),
            residual.unsafe_ptr(),
            gain.unsafe_ptr(),
            wp,
            wp,
            y.dim_size(0),
            y.dim_size(1),
            x.dim_size(1),
            eps,
            ctx,
        )


@extensibility.register("mili.norm_linear_bias")
struct NormLinearBias:
    """The same with a bias per output."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32, batch_invariant: Bool
    ](
        y: OutputTensor[rank=2, ...],
        residual_out: OutputTensor[dtype=y.dtype, rank=2, ...],
        normed: OutputTensor[dtype=y.dtype, rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        gain: InputTensor[dtype=y.dtype, rank=1, ...],
        w: InputTensor[dtype=y.dtype, rank=2, ...],
        bias: InputTensor[dtype=y.dtype, rank=1, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.
            batch_invariant: Whether a row's bits may not depend on T.

        Args:
            y: Product [T, N].
            residual_out: Sum x + residual [T, H].
            normed: Scratch [T, H].
            x: Output of the previous block [T, H].
            residual: Residual stream [T, H].
            gain: Gain of the norm [H].
            w: Weight, packed on the CPU.
            bias: Added to each row [N].
            ctx: Device context.

        Raises:
            Error: If H is odd for bfloat16 on the CPU, or a launch fails.
        """
        _norm_linear[target, True, batch_invariant](
            y.unsafe_ptr(),
            residual_out.unsafe_ptr(),
            normed.unsafe_ptr(),
            x.unsafe_ptr(),
            residual.unsafe_ptr(),
            gain.unsafe_ptr(),
            w.unsafe_ptr(),
            bias.unsafe_ptr(),
            y.dim_size(0),
            y.dim_size(1),
            x.dim_size(1),
            eps,
            ctx,
        )


@extensibility.register("mili.norm_linear_silu_mul")
struct NormLinearSiluMul:
    """Norm, gate and up projection and activation: an MLP up to its last product."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32, batch_invariant: Bool
    ](
        y: OutputTensor[rank=2, ...],
        residual_out: OutputTensor[dtype=y.dtype, rank=2, ...],
        normed: OutputTensor[dtype=y.dtype, rank=2, ...],
        gate_up: OutputTensor[dtype=y.dtype, rank=2, ...],
        x: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        gain: InputTensor[dtype=y.dtype, rank=1, ...],
        w: InputTensor[dtype=y.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.
            batch_invariant: Whether a row's bits may not depend on T.

        Args:
            y: Activations [T, I].
            residual_out: Sum x + residual [T, H].
            normed: Scratch [T, H].
            gate_up: Scratch [T, 2I]; on the GPU in bfloat16 of any size, as it is not used.
            x: Output of the previous block [T, H].
            residual: Residual stream [T, H].
            gain: Gain of the norm [H].
            w: Weight of gate, then up, packed on the CPU.
            ctx: Device context.

        Raises:
            Error: If H is odd for bfloat16 on the CPU, or a launch fails.
        """
        _norm_linear_silu_mul[target, batch_invariant](
            y.unsafe_ptr(),
            residual_out.unsafe_ptr(),
            normed.unsafe_ptr(),
            gate_up.unsafe_ptr(),
            x.unsafe_ptr(),
            residual.unsafe_ptr(),
            gain.unsafe_ptr(),
            w.unsafe_ptr(),
            y.dim_size(0),
            y.dim_size(1),
            x.dim_size(1),
            eps,
            ctx,
        )
