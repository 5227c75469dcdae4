"""`mili.embedding`: token ids to the first hidden rows."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op


def embedding(token_ids: TensorValue, table: TensorValue, hidden_size: int) -> tuple[TensorValue, TensorValue]:
    """Gather one row of `table` for each token and start the residual stream at zero.

    Args:
        token_ids: [T] int32, each below the vocabulary size.
        table: [V, H] on a GPU, [ceil(V/32), H*32] packed panels on the CPU; bfloat16 or float32.
        hidden_size: H.

    Returns:
        (hidden, zeros), both [T, H] in the table's dtype.
    """
    check_tensor("embedding", "token_ids", token_ids, DType.int32, "T")
    check_tensor("embedding", "table", table, (DType.bfloat16, DType.float32), "V", "row")
    row = TensorType(table.dtype, [token_ids.shape[0], hidden_size], token_ids.device)
    hidden, zeros = kernel_op("embedding", token_ids.device, [token_ids, table], [row, row])
    return hidden, zeros
