"""`mili.add_rms_norm`: residual add and RMSNorm in one pass."""

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
    check_tensor("add_rms_norm", "x", x, (DType.bfloat16, DType.float32), "T", "H")
    hidden = int(x.shape[1])
    check_tensor("add_rms_norm", "residual", residual, x.dtype, "T", hidden)
    check_tensor("add_rms_norm", "weight", weight, x.dtype, hidden)
    out = TensorType(x.dtype, x.shape, x.device)
    y, total = kernel_op("add_rms_norm", x.device, [x, residual, weight], [out, out], {"eps": eps})
    return y, total


# --8<-- [end:add_rms_norm]
