"""`mili.feed_forward`: what a decoder layer computes behind its attention."""

from max.dtype import DType
from max.graph import BufferValue, TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op
from mili.ops.linear import linear_weight_shape

_HEAD, _ROWS = 16, 4  # the kernel's own constants


def exchange_shape(hidden: int, width: int) -> list[int]:
    """Shape of the uint64 buffer through which the blocks of the kernel for few rows tell each other their sums."""
    return [_HEAD + _ROWS * (hidden + width) // 2]


def feed_forward(
    attended: TensorValue,
    residual: TensorValue,
    gain: TensorValue,
    w_o: TensorValue,
    w_gate_up: TensorValue,
    w_down: TensorValue,
    exchange: BufferValue,
    width: int,
    eps: float,
    *,
    batch_invariant: bool = False,
) -> tuple[TensorValue, TensorValue]:
    """Return (mlp(rms_norm(r) * gain), r) where r = attended @ w_o^T + residual.

    Args:
        attended: [T, Q] output of attention, bfloat16 or float32.
        residual: [T, H] residual stream, dtype of `attended`.
        gain: [H] of the norm, dtype of `attended`.
        w_o: H rows of Q in the shape of `linear_weight_shape`, dtype of `attended`.
        w_gate_up: Rows of gate, then of up, 2 * `width` of H in all, likewise.
        w_down: H rows of `width`, likewise.
        exchange: uint64 of `exchange_shape`, zeros before the first call and then left alone; calls with it run
            one after the other.
        width: I.
        eps: Added to the mean square.
        batch_invariant: Whether a row's bits may not depend on the other rows; on the CPU they never do.

    Returns:
        What the layer adds last and the residual stream before that, both [T, H].
    """
    op, dtype, device = "feed_forward", attended.dtype, attended.device
    check_tensor(op, "attended", attended, (DType.bfloat16, DType.float32), "T", "Q")
    check_tensor(op, "residual", residual, dtype, "T", "H")
    q, hidden = int(attended.shape[1]), int(residual.shape[1])
    check_tensor(op, "gain", gain, dtype, hidden)
    check_tensor(op, "w_o", w_o, dtype, *linear_weight_shape(hidden, q, device.is_cpu()))
    check_tensor(op, "w_gate_up", w_gate_up, dtype, *linear_weight_shape(2 * width, hidden, device.is_cpu()))
    check_tensor(op, "w_down", w_down, dtype, *linear_weight_shape(hidden, width, device.is_cpu()))
    check_tensor(op, "exchange", exchange, DType.uint64, *exchange_shape(hidden, width))
    row = TensorType(dtype, residual.shape, device)
    acts = TensorType(dtype, [residual.shape[0], width], device)
    fused = not device.is_cpu() and dtype == DType.bfloat16
    gate_up = TensorType(dtype, [1 if fused else residual.shape[0], 2 * width], device)
    values: list[TensorValue | BufferValue] = [exchange, attended, residual, gain, w_o, w_gate_up, w_down]
    parameters = {"eps": eps, "batch_invariant": batch_invariant, "q": q, "hidden": hidden, "width": width}
    # Behind the results: scratch.
    y, total, *_ = kernel_op(op, device, values, [row, row, row, row, acts, gate_up], parameters)
    return y, total
