"""`mili.sample`: one token from each row of logits, with log-probabilities of the row before any edit."""

from typing import NamedTuple

from max.dtype import DType
from max.graph import TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op
from mili.sampling_params import MAX_LOGPROBS

__all__ = ["Sampled", "sample"]


class Sampled(NamedTuple):
    """What `sample` adds to the graph, in the order of the graph's outputs."""

    token_ids: TensorValue  # [R] int32
    logprobs: TensorValue  # [R] float32 of the sampled, or the target, token; 0 if the row wants no log-probabilities
    ranks: TensorValue  # [R] int32, 1 for the likeliest; 0 if the row wants no log-probabilities
    top_ids: TensorValue  # [R, 20] int32 likeliest first, lowest id first among equals; -1 past num_logprobs
    top_logprobs: TensorValue  # [R, 20] float32; -inf past num_logprobs


def sample(
    logits: TensorValue,
    floats: TensorValue,
    ints: TensorValue,
    edit_starts: TensorValue,
    edit_ids: TensorValue,
    edit_values: TensorValue,
    masks: TensorValue,
) -> Sampled:
    """Edit, mask, filter and sample each row of logits; the arrays of a `SamplingBatch` say how.

    Args:
        logits: [R, V] float32; not modified. The op takes as much device memory again for rows with edits or a mask.
        floats: [R, 3] float32 temperature (0 is greedy), top_p, min_p.
        ints: [R, 7] int32 top_k, num_logprobs (-1 for none), target_id (-1 for the sampled token), seed_lo, seed_hi,
            position, mask (a row of `masks`, -1 for none).
        edit_starts: [R+1] int32 first edit of each row.
        edit_ids: [E] int32 token ids, distinct within a row; E is at least 1, used or not.
        edit_values: [E, 3] float32 bias, repetition penalty, amount to subtract.
        masks: [G, W] int32 allowed tokens, token i as bit i % 32 of word i // 32; G and W are at least 1, used or not.

    Raises:
        ValueError: A dtype, rank or static dimension differs from the above.
    """
    check_tensor("sample", "logits", logits, DType.float32, "R", "V")
    check_tensor("sample", "floats", floats, DType.float32, "R", 3)
    check_tensor("sample", "ints", ints, DType.int32, "R", 7)
    check_tensor("sample", "edit_starts", edit_starts, DType.int32, "R_plus_1")
    check_tensor("sample", "edit_ids", edit_ids, DType.int32, "E")
    check_tensor("sample", "edit_values", edit_values, DType.float32, "E", 3)
    check_tensor("sample", "masks", masks, DType.int32, "G", "W")
    rows, device = logits.shape[0], logits.device
    types = [
        TensorType(DType.int32, [rows], device),
        TensorType(DType.float32, [rows], device),
        TensorType(DType.int32, [rows], device),
        TensorType(DType.int32, [rows, MAX_LOGPROBS], device),
        TensorType(DType.float32, [rows, MAX_LOGPROBS], device),
        TensorType(DType.float32, logits.shape, device),  # edited and masked rows, for the op alone
    ]
    values = [logits, floats, ints, edit_starts, edit_ids, edit_values, masks]
    return Sampled(*kernel_op("sample", device, values, types)[:5])
