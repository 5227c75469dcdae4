"""`mili.silu_mul`: the MLP's gated activation."""

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op


def silu_mul(gate_up: TensorValue) -> TensorValue:
    """Return silu(gate) * up as [T, I] from gate_up [T, 2I], bfloat16 or float32, gate first."""
    check_tensor("silu_mul", "gate_up", gate_up, (DType.bfloat16, DType.float32), "T", "2I")
    width = int(gate_up.shape[1])
    if width % 2:
        raise ValueError(f"silu_mul: gate_up has {width} columns, expected an even number (gate, then up)")
    out = TensorType(gate_up.dtype, [gate_up.shape[0], width // 2], gate_up.device)
    return kernel_op("silu_mul", gate_up.device, [gate_up], [out])[0]
