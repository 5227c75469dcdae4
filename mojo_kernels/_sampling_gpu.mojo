"""GPU path of `mili.sample`: one thread block or cluster per row, which makes the passes of the CPU path with 1024 threads a block.

All threads of a row follow the same decisions, which they read from shared memory, so every barrier is met by all. How many
blocks share a row depends on the number of rows, the result does not: every decision is made in integers.
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from max.gpu.host import Dim
from std.utils.static_tuple import StaticTuple

from ._prelude import *
from ._sampling_block_gpu import LIST_IDS, LIST_KEYS, NUM_WORDS, THREADS, VEC, Words, _argmax, _each, _rank, _row_barrier
from ._sampling_draw_gpu import _choose
from ._sampling_logprobs_gpu import _list_top, _total_and_rank
from ._sampling_math import (
    LOWEST_KEY,
    MAX_LOGPROBS,
    NUM_FLOATS,
    NUM_INTS,
    _allowed,
    _edited,
    _key,
    _key_value,
    _log_total,
    _logprob,
)


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))  # so that the registers suffice
def _sample_kernel[
    ALIGN: Int, C: Int
](
    token_ids: Ptr[DType.int32],
    logprobs: Ptr[F32],
    ranks: Ptr[DType.int32],
    top_ids: Ptr[DType.int32],
    top_logprobs: Ptr[F32],
    scratch: Ptr[F32],
    logits: Ptr[F32],
    floats: Ptr[F32],
    ints: Ptr[DType.int32],
    edit_starts: Ptr[DType.int32],
    edit_ids: Ptr[DType.int32],
    edit_values: Ptr[F32],
    masks: Ptr[DType.int32],
    num_masks: Int32,
    num_words: Int32,
    v32: Int32,
):
    comptime assert WARP_SIZE == 32, "a warp holds one value per warp of the block"
    var words = rebind[Words](unsafe_stack_allocation[NUM_WORDS, UInt32, address_space=AddressSpace.SHARED]())
    var v = Int(v32)
    var r = block_idx.y
    launch_dependent_grids()
    wait_on_dependent_grids()
    var raw = logits.unsafe_offset(r * v)
    var row_ints = ints.unsafe_offset(r * NUM_INTS)
    var x = raw
    var first_edit = Int(edit_starts[unsafe_offset=r])
    var end_edit = Int(edit_starts[unsafe_offset=r + 1])
    var own_mask = Int(row_ints[unsafe_offset=6])
    var masked = 0 <= own_mask and own_mask < Int(num_masks)
    if first_edit < end_edit or masked:
        x = scratch.unsafe_offset(r * v)
        var mask_len = Int(num_words)
        var mask = masks.unsafe_offset(own_mask * mask_len if masked else 0)

        def copy(i: Int, values: SIMD[F32, VEC]) {imm}:
            comptime for lane in range(VEC):
                if i + lane < v:
                    x[unsafe_offset=i + lane] = values[lane]

        def copy_allowed(i: Int, values: SIMD[F32, VEC]) {imm}:
            comptime for lane in range(VEC):
                if i + lane < v:
                    x[unsafe_offset=i + lane] = values[lane] if _allowed(mask, mask_len, i + lane) else _key_value(LOWEST_KEY)

        if masked:
            _each[ALIGN, C](raw, v, copy_allowed)
        else:
            _each[ALIGN, C](raw, v, copy)
        _row_barrier[C]()
        for edit in range(first_edit + _rank[C]() * THREADS + thread_idx.x, end_edit, C * THREADS):
            var token_id = Int(edit_ids[unsafe_offset=edit])
            if 0 <= token_id and token_id < v and (not masked or _allowed(mask, mask_len, token_id)):
                x[unsafe_offset=token_id] = _edited(raw[unsafe_offset=token_id], edit_values, edit)
        _row_barrier[C]()

    var top_key = UInt32(0)
    var token = _choose[ALIGN, C](words, x, v, floats.unsafe_offset(r * NUM_FLOATS), row_ints, top_key)
    var n = min(Int(row_ints[unsafe_offset=1]), MAX_LOGPROBS)
    var first_block = _rank[C]() == 0
    if first_block and thread_idx.x < MAX_LOGPROBS:
        top_ids[unsafe_offset=r * MAX_LOGPROBS + thread_idx.x] = -1
        top_logprobs[unsafe_offset=r * MAX_LOGPROBS + thread_idx.x] = _key_value(LOWEST_KEY)
    if first_block and thread_idx.x == 0:
        token_ids[unsafe_offset=r] = Int32(token)
        logprobs[unsafe_offset=r] = 0
        ranks[unsafe_offset=r] = 0
    if n < 0:
        return
    var target = Int(row_ints[unsafe_offset=2])
    if target < 0 or target >= v:
        target = token
    if x != raw:
        var likeliest = 0
        top_key = _argmax[ALIGN, C](words, raw, v, likeliest)
    var top = _key_value(top_key)
    var target_key = _key(raw[unsafe_offset=target])
    var rank = 0
    var total = _total_and_rank[ALIGN, C](words, raw, v, top, target_key, rank)
    var log_total = _log_total(total) if top_key != LOWEST_KEY else Float32(0)
    if first_block and thread_idx.x == 0:
        logprobs[unsafe_offset=r] = _logprob(target_key, top, log_total)
        ranks[unsafe_offset=r] = Int32(rank)
    n = min(n, v)
    if n == 0:
        return
    _list_top[ALIGN, C](words, raw, v, top_key, n)
    if first_block and thread_idx.x < n:  # each entry counts the entries before it, which is its place
        var key = words[unsafe_offset=LIST_KEYS + thread_idx.x]
        var token_id = words[unsafe_offset=LIST_IDS + thread_idx.x]
        var place = r * MAX_LOGPROBS
        for other in range(n):
            var other_key = words[unsafe_offset=LIST_KEYS + other]
            if other_key > key or (other_key == key and words[unsafe_offset=LIST_IDS + other] < token_id):
                place += 1
        top_ids[unsafe_offset=place] = Int32(token_id)
        top_logprobs[unsafe_offset=place] = _logprob(key, top, log_total)


def _sample_gpu(
    token_ids: Ptr[DType.int32],
    logprobs: Ptr[F32],
    ranks: Ptr[DType.int32],
    top_ids: Ptr[DType.int32],
    top_logprobs: Ptr[F32],
    scratch: Ptr[F32],
    logits: Ptr[F32],
    floats: Ptr[F32],
    ints: Ptr[DType.int32],
    edit_starts: Ptr[DType.int32],
    edit_ids: Ptr[DType.int32],
    edit_values: Ptr[F32],
    masks: Ptr[DType.int32],
    num_masks: Int,
    num_words: Int,
    rows: Int,
    v: Int,
    ctx: DeviceContext,
) raises:
    """Launches a cluster or a block per row; rows whose starts are not all 16-byte aligned are read element by element."""

    @always_inline
    def launch[ALIGN: Int, C: Int]() raises {imm}:
        comptime kernel = _sample_kernel[ALIGN, C]
        ctx.enqueue_function[kernel](
            token_ids,
            logprobs,
            ranks,
            top_ids,
            top_logprobs,
            scratch,
            logits,
            floats,
            ints,
            edit_starts,
            edit_ids,
            edit_values,
            masks,
            Int32(num_masks),
            Int32(num_words),
            Int32(v),
            grid_dim=(C, rows),
            block_dim=THREADS,
            cluster_dim=Dim(C, 1, 1),
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    # A multiprocessor holds one block: as many to a row as keep all of them busy at once. Sixteen clusters of 8 do not fit.
    if v % VEC != 0:
        launch[4, 1]()
    elif rows <= 8:
        launch[4 * VEC, 8]()
    elif rows <= 64:
        launch[4 * VEC, 2]()
    else:
        launch[4 * VEC, 1]()
