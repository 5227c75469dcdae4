"""`mili.norm_linear` and `mili.norm_linear_silu_mul`: residual add, RMSNorm and the product behind it in one op."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op
from mili.ops.linear import linear_weight_shape


def norm_linear(
    x: TensorValue,
    residual: TensorValue,
    gain: TensorValue,
    weight: TensorValue,
    out_features: int,
    eps: float,
    bias: TensorValue | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[TensorValue, TensorValue]:
    """Return (rms_norm(x + residual) * gain @ weight^T (+ bias), x + residual).

    Args:
        x: [T, H] output of the previous block, bfloat16 or float32.
        residual: [T, H] residual stream, dtype of `x`.
        gain: [H] of the norm, dtype of `x`.
        weight: N rows of H in the shape of `linear_weight_shape`, dtype of `x`.
        out_features: N.
        eps: Added to the mean square.
        bias: [N], dtype of `x`.
        batch_invariant: Whether a row's bits may not depend on the other rows; on the CPU they never do.

    Returns:
        The product [T, N] and the new residual stream [T, H].
    """
    _check("norm_linear", x, residual, gain, weight, out_features)
    row = TensorType(x.dtype, x.shape, x.device)
    out = [TensorType(x.dtype, [x.shape[0], out_features], x.device), row, row]  # the last is scratch
    values = [x, residual, gain, weight]
    parameters = {"eps": eps, "batch_invariant": batch_invariant}
    if bias is None:
        y, total, _ = kernel_op("norm_linear", x.device, values, out, parameters)
        return y, total
    check_tensor("norm_linear", "bias", bias, x.dtype, out_features)
    y, total, _ = kernel_op("norm_linear_bias", x.device, [*values, bias], out, parameters)
    return y, total


def norm_linear_silu_mul(
    x: TensorValue,
    residual: TensorValue,
    gain: TensorValue,
    weight: TensorValue,
    width: int,
    eps: float,
    *,
    batch_invariant: bool = False,
) -> tuple[TensorValue, TensorValue]:
    """Return (silu(h @ gate^T) * (h @ up^T), x + residual) where h = rms_norm(x + residual) * gain.

    Args:
        x: [T, H] output of the previous block, bfloat16 or float32.
        residual: [T, H] residual stream, dtype of `x`.
        gain: [H] of the norm, dtype of `x`.
        weight: Rows of gate, then of up, 2 * `width` in all, in the shape of `linear_weight_shape`, dtype of `x`.
        width: I.
        eps: Added to the mean square.
        batch_invariant: As for `norm_linear`.

    Returns:
        The activations [T, I] and the new residual stream [T, H].
    """
    _check("norm_linear_silu_mul", x, residual, gain, weight, 2 * width)
    row = TensorType(x.dtype, x.shape, x.device)
    fused = not x.device.is_cpu() and x.dtype == DType.bfloat16
    # The GPU's product applies the SiLU itself, so that its sums need no place in memory.
    gate_up = TensorType(x.dtype, [1 if fused else x.shape[0], 2 * width], x.device)
    out = [TensorType(x.dtype, [x.shape[0], width], x.device), row, row, gate_up]  # the last two are scratch
    parameters = {"eps": eps, "batch_invariant": batch_invariant}
    y, total, _, _ = kernel_op("norm_linear_silu_mul", x.device, [x, residual, gain, weight], out, parameters)
    return y, total


def _check(
    op: str, x: TensorValue, residual: TensorValue, gain: TensorValue, weight: TensorValue, out_features: int
) -> None:
    check_tensor(op, "x", x, (DType.bfloat16, DType.float32), "T", "H")
    hidden = int(x.shape[1])
    check_tensor(op, "residual", residual, x.dtype, "T", hidden)
    check_tensor(op, "gain", gain, x.dtype, hidden)
    check_tensor(op, "weight", weight, x.dtype, *linear_weight_shape(out_features, hidden, x.device.is_cpu()))
