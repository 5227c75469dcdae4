"""`mili.linear` and `mili.linear_bias`: activations times a weight."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op

PANEL = 32  # output rows that one CPU panel holds; the kernels' own constant


def linear_weight_shape(rows: int, columns: int, on_cpu: bool) -> list[int]:
    """Shape in which a weight [rows, columns] reaches the graph: packed panels on the CPU, as stored on a GPU."""
    return [-(-rows // PANEL), columns * PANEL] if on_cpu else [rows, columns]


def linear(
    x: TensorValue,
    weight: TensorValue,
    out_features: int,
    bias: TensorValue | None = None,
    out_dtype: DType | None = None,
    *,
    batch_invariant: bool = False,
) -> TensorValue:
    """Return x @ weight^T (+ bias) as [M, N].

    Args:
        x: [M, K], bfloat16 or float32.
        weight: N rows of K in the shape of `linear_weight_shape`, dtype of `x`.
        out_features: N.
        bias: [N], dtype of `x`.
        out_dtype: dtype of the result, that of `x` by default; float32 for logits.
        batch_invariant: Whether a row's bits may not depend on the other rows; on the CPU they never do.
    """
    check_tensor("linear", "x", x, (DType.bfloat16, DType.float32), "M", "K")
    columns = int(x.shape[1])
    shape = linear_weight_shape(out_features, columns, x.device.is_cpu())
    check_tensor("linear", "weight", weight, x.dtype, *shape)
    out = TensorType(out_dtype or x.dtype, [x.shape[0], out_features], x.device)
    parameters = {"batch_invariant": batch_invariant}
    if bias is None:
        return kernel_op("linear", x.device, [x, weight], [out], parameters)[0]
    check_tensor("linear", "bias", bias, x.dtype, out_features)
    return kernel_op("linear_bias", x.device, [x, weight, bias], [out], parameters)[0]
