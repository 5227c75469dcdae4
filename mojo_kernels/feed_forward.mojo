"""What a decoder layer computes behind its attention: output projection, residual add, norm and MLP.

Math:      r = round(x + residual), x = attended wo^T;  h = round(r / sqrt(mean(r^2) + eps) * gain)
           y = (silu(h wg^T) * (h wu^T)) wd^T; every product is rounded
Shapes:    y, residual_out, projected, normed [T, H] = attended [T, Q], residual [T, H], gain [H]; w_o, w_gate_up, w_down as for
           `linear` with H, 2I and H rows; acts [T, I]
Dtypes:    bfloat16 or float32
CPU:       `linear`, `norm_linear_silu_mul`, `linear`, one after the other
GPU:       up to 4 rows of small weights in bfloat16: one kernel, `_feed_forward_gpu`; otherwise as on the CPU, but that the
           first product fetches the other weights into the L2 cache when its own is small and rows are few
Bound:     bytes = (Q H + 3 H I + (Q + 3 H) T) sizeof(dtype); flops = 2 T (Q H + 3 H I)
Limits:    those of `linear`; residual_out is not residual. On the GPU `exchange` [words] uint64 is zeros at first, then left alone,
           and all calls with it are on one stream
"""

from ._feed_forward_gpu import feed_forward_gpu, fits_feed_forward, suits_feed_forward
from ._prelude import *
from .linear import _linear, _linear_ahead
from .norm_linear import _norm_linear_silu_mul


@extensibility.register("mili.feed_forward")
struct FeedForward:
    """Output projection, residual add, norm and MLP."""

    @staticmethod
    def execute[
        target: StaticString, eps: Float32, batch_invariant: Bool, q: Int, hidden: Int, width: Int
    ](
        y: OutputTensor[rank=2, ...],
        residual_out: OutputTensor[dtype=y.dtype, rank=2, ...],
        projected: OutputTensor[dtype=y.dtype, rank=2, ...],
        normed: OutputTensor[dtype=y.dtype, rank=2, ...],
        acts: OutputTensor[dtype=y.dtype, rank=2, ...],
        gate_up: OutputTensor[dtype=y.dtype, rank=2, ...],
        exchange: MutableInputTensor[dtype=DType.uint64, rank=1, ...],
        attended: InputTensor[dtype=y.dtype, rank=2, ...],
        residual: InputTensor[dtype=y.dtype, rank=2, ...],
        gain: InputTensor[dtype=y.dtype, rank=1, ...],
        w_o: InputTensor[dtype=y.dtype, rank=2, ...],
        w_gate_up: InputTensor[dtype=y.dtype, rank=2, ...],
        w_down: InputTensor[dtype=y.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".
            eps: Added to the mean square.
            batch_invariant: Whether a row's bits may not depend on T.
            q: Columns of attended.
            hidden: H.
            width: I.

        Args:
            y: Output [T, H].
            residual_out: Sum of the output projection and residual [T, H].
            projected: Scratch [T, H].
            normed: Scratch [T, H].
            acts: Scratch [T, I].
            gate_up: Scratch [T, 2I]; on the GPU in bfloat16 of any size, as it is not used.
            exchange: What the blocks of the kernel for few rows tell each other.
            attended: Output of attention [T, Q].
            residual: Residual stream [T, H].
            gain: Gain of the norm [H].
            w_o: Weight of the output projection, packed on the CPU.
            w_gate_up: Weight of gate, then up, packed on the CPU.
            w_down: Weight of the last product, packed on the CPU.
            ctx: Device context.

        Raises:
            Error: If Q, H or I is odd for bfloat16 on the CPU, or a launch fails.
        """
        var m = y.dim_size(0)
        if m == 0:
            return
        var yp = y.unsafe_ptr()
        var op = residual_out.unsafe_ptr()
        var ap = attended.unsafe_ptr()
        var rp = residual.unsafe_ptr()
        var gp = gain.unsafe_ptr()
        var w_op = w_o.unsafe_ptr()
        var w_gp = w_gate_up.unsafe_ptr()
        var w_dp = w_down.unsafe_ptr()
        comptime P = Ptr[BF16]
        comptime if is_gpu[target]() and y.dtype == BF16 and not batch_invariant:
            comptime if suits_feed_forward(q, hidden, width):
                if fits_feed_forward(m, ctx):
                    feed_forward_gpu[q, hidden, width](
                        rebind[P](yp),
                        rebind[P](op),
                        rebind[P](ap),
                        rebind[P](rp),
                        rebind[P](gp),
                        rebind[P](w_op),
                        rebind[P](w_gp),
                        rebind[P](w_dp),
                        exchange.unsafe_ptr(),
                        m,
                        eps,
                        ctx,
                    )
                    return
        var xp = projected.unsafe_ptr()
        _linear_ahead[target, batch_invariant](xp, ap, w_op, w_gp, 2 * width * hidden, w_dp, width * hidden, m, hidden, q, ctx)
        _norm_linear_silu_mul[target, batch_invariant](
            acts.unsafe_ptr(), op, normed.unsafe_ptr(), gate_up.unsafe_ptr(), xp, rp, gp, w_gp, m, width, hidden, eps, ctx
        )
        _linear[target, False, batch_invariant](yp, acts.unsafe_ptr(), w_dp, w_dp, m, hidden, width, ctx)
