"""Samples one token from each row of logits, and reports log-probabilities of the unedited row.

Math:      l'_i = rep(l_i + bias_i) - subtract_i for the row's edits, rep(x) = x / r if x > 0 else x r; then
           l'_i = -inf where bit i of the row's mask is 0
           temperature 0: token = argmax l', lowest id among equals
           else y = (l' - max l') / temperature; keep the top_k largest; of those the smallest set of largest whose
           probability reaches top_p; of those the ones at least min_p as likely as the likeliest; then draw
           token = min {i : sum_{j <= i} m_j > u}, m = 2^40 exp(y) as an integer for kept tokens, u uniform below sum m
           logprob = l - max l - log sum exp(l - max l);  rank = 1 + |{i : l_i > l_token}|
Shapes:    token_ids [R], logprobs [R], ranks [R], top_ids [R, 20], top_logprobs [R, 20], scratch [R, V]
           = logits [R, V], floats [R, 3] (temperature, top_p, min_p), ints [R, 7] (top_k, num_logprobs, target_id,
           seed_lo, seed_hi, position, mask), edit_starts [R+1], edit_ids [E], edit_values [E, 3] (bias, r,
           subtract), masks [G, W] (token i is bit i % 32 of word i / 32)
           num_logprobs -1 skips the second half: logprob 0, rank 0, ids -1, values -inf; a target_id >= 0 is reported
           in place of the sampled token; mask is a row of masks, or -1 for none
Dtypes:    logits float32, ids int32. Keys (order-preserving uint32) and masses (uint64) make every decision in
           integers, so threads, neighbours and the device do not change a token
CPU:       parallel over rows; SIMD over V. A threshold is a radix search: bins of y, then of the key's digits
GPU:       a cluster of 8 thread blocks of 1024 threads per row up to 8 rows, of 2 up to 64 rows, then one block; warps
           share histograms by shared-memory atomics and blocks add theirs; a draw narrows a segment 32-fold at a time. A
           row is read once for argmax, twice for a plain draw, three or four times to filter where that leaves 2048
           candidates or fewer, which then are in shared memory, else some 8 times; log-probabilities take one pass, the
           likeliest two or three
Bound:     bytes = 4 R V (greedy); flops = R V
Limits:    V < 2^22. Tokens tied with the last one that a filter keeps are kept. Tokens less likely than 2^-40 times the
           likeliest are never drawn. NaN counts as -inf, +inf as the largest float; a row without any other value gives
           token 0. Edits outside the vocabulary are ignored, as is a mask outside 0..G-1; tokens past a mask's words are
           forbidden. scratch holds the edited and masked rows; its content is unspecified
Source:    order of filters as transformers and vLLM; penalties as vLLM; Philox4x32-10, Salmon et al. 2011
"""

from ._prelude import *
from ._sampling_cpu import _sample_cpu
from ._sampling_gpu import _sample_gpu


@extensibility.register("mili.sample")
struct Sample:
    """Edits, masks, filters and draws; see the header."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        token_ids: OutputTensor[dtype=DType.int32, rank=1, ...],
        logprobs: OutputTensor[dtype=F32, rank=1, ...],
        ranks: OutputTensor[dtype=DType.int32, rank=1, ...],
        top_ids: OutputTensor[dtype=DType.int32, rank=2, ...],
        top_logprobs: OutputTensor[dtype=F32, rank=2, ...],
        scratch: OutputTensor[dtype=F32, rank=2, ...],
        logits: InputTensor[dtype=F32, rank=2, ...],
        floats: InputTensor[dtype=F32, rank=2, ...],
        ints: InputTensor[dtype=DType.int32, rank=2, ...],
        edit_starts: InputTensor[dtype=DType.int32, rank=1, ...],
        edit_ids: InputTensor[dtype=DType.int32, rank=1, ...],
        edit_values: InputTensor[dtype=F32, rank=2, ...],
        masks: InputTensor[dtype=DType.int32, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".

        Args:
            token_ids: Sampled tokens [R].
            logprobs: Their, or the targets', log-probabilities [R].
            ranks: Their ranks [R], from 1.
            top_ids: Likeliest tokens [R, 20].
            top_logprobs: Their log-probabilities [R, 20].
            scratch: Room for edited rows [R, V].
            logits: Logits [R, V].
            floats: Parameters [R, 3].
            ints: Parameters [R, 7].
            edit_starts: First edit of each row [R+1].
            edit_ids: Edited tokens [E].
            edit_values: Edits [E, 3].
            masks: Allowed tokens [G, W].
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var rows = logits.dim_size(0)
        var v = logits.dim_size(1)
        if rows == 0 or v == 0:
            return
        if v >= 1 << 22:
            raise Error("mili.sample: vocabulary of ", v, " is too large, the limit is 4194303")
        comptime if is_cpu[target]():
            _sample_cpu(
                token_ids.unsafe_ptr(),
                logprobs.unsafe_ptr(),
                ranks.unsafe_ptr(),
                top_ids.unsafe_ptr(),
                top_logprobs.unsafe_ptr(),
                scratch.unsafe_ptr(),
                logits.unsafe_ptr(),
                floats.unsafe_ptr(),
                ints.unsafe_ptr(),
                edit_starts.unsafe_ptr(),
                edit_ids.unsafe_ptr(),
                edit_values.unsafe_ptr(),
                masks.unsafe_ptr(),
                masks.dim_size(0),
                masks.dim_size(1),
                rows,
                v,
            )
        elif is_gpu[target]():
            _sample_gpu(
                token_ids.unsafe_ptr(),
                logprobs.unsafe_ptr(),
                ranks.unsafe_ptr(),
                top_ids.unsafe_ptr(),
                top_logprobs.unsafe_ptr(),
                scratch.unsafe_ptr(),
                logits.unsafe_ptr(),
                floats.unsafe_ptr(),
                ints.unsafe_ptr(),
                edit_starts.unsafe_ptr(),
                edit_ids.unsafe_ptr(),
                edit_values.unsafe_ptr(),
                masks.unsafe_ptr(),
                masks.dim_size(0),
                masks.dim_size(1),
                rows,
                v,
                ctx,
            )
        else:
            comptime assert False, "mili.sample: unsupported target"
