"""`mili.add_rms_norm` and `mili.add_rms_norm_rows`: residual add and RMSNorm in one pass."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op


# --8<-- [start:add_rms_norm]
def add_rms_norm(
    x: TensorValue, residual: TensorValue, weight: TensorValue, eps: float
) -> tuple[TensorValue, TensorValue]:
    """Return (rms_norm(x + residual) * weight, x + residual).

    Args:
        x: [T, H] output of the previous block, bfloat16 or float32.
        residual: [T, H] residual stream, dtype of `x`.
        weight: [H] gain, dtype of `x`.
        eps: Added to the mean square.

    Returns:
        Normalised rows and the new residual stream, both [T, H].
    """
    _check("add_rms_norm", x, residual, weight)
    out = TensorType(x.dtype, x.shape, x.device)
    y, total = kernel_op("add_rms_norm", x.device, [x, residual, weight], [out, out], {"eps": eps})
    return y, total


# --8<-- [end:add_rms_norm]


def add_rms_norm_rows(
    x: TensorValue, residual: TensorValue, rows: TensorValue, weight: TensorValue, eps: float
) -> TensorValue:
    """Return rms_norm(x + residual) * weight for the rows [R] int32 only, as [R, H]."""
    _check("add_rms_norm_rows", x, residual, weight)
    check_tensor("add_rms_norm_rows", "rows", rows, DType.int32, "R")
    out = TensorType(x.dtype, [rows.shape[0], x.shape[1]], x.device)
    return kernel_op("add_rms_norm_rows", x.device, [x, residual, rows, weight], [out], {"eps": eps})[0]


def _check(op: str, x: TensorValue, residual: TensorValue, weight: TensorValue) -> None:
    check_tensor(op, "x", x, (DType.bfloat16, DType.float32), "T", "H")
    hidden = int(x.shape[1])
    check_tensor(op, "residual", residual, x.dtype, "T", hidden)
    check_tensor(op, "weight", weight, x.dtype, hidden)
