"""`mili.take_rows`: the same chosen rows of two arrays."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op


def take_rows(a: TensorValue, b: TensorValue, rows: TensorValue) -> tuple[TensorValue, TensorValue]:
    """Return (a[rows], b[rows]).

    Args:
        a: [T, A], bfloat16 or float32.
        b: [T, B], dtype of `a`.
        rows: [R] int32, each below T.

    Returns:
        Rows [R, A] and [R, B].
    """
    check_tensor("take_rows", "a", a, (DType.bfloat16, DType.float32), "T", "A")
    check_tensor("take_rows", "b", b, a.dtype, "T", "B")
    check_tensor("take_rows", "rows", rows, DType.int32, "R")
    out = [TensorType(a.dtype, [rows.shape[0], source.shape[1]], a.device) for source in (a, b)]
    a_rows, b_rows = kernel_op("take_rows", a.device, [a, b, rows], out)
    return a_rows, b_rows
