"""GPU path of `mili.sample`: one thread block per row, which makes the passes of the CPU path with 1024 threads.

All threads of a block follow the same decisions, which they read from shared memory, so every barrier is met by all.
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from std.utils.static_tuple import StaticTuple

from ._prelude import *
from ._sampling_block_gpu import (
    LIST_IDS,
    LIST_KEYS,
    NUM_WORDS,
    THREADS,
    VEC,
    WARPS,
    WARP_HIGHS,
    WARP_LOWS,
    Words,
    _argmax,
    _each,
    _load,
    _store_wide,
    _warp_sum,
    _wide,
)
from ._sampling_filter_gpu import _filter
from ._sampling_logprobs_gpu import _list_top, _rank, _total_mass
from ._sampling_math import (
    LOWEST_KEY,
    MAX_LOGPROBS,
    NUM_FLOATS,
    NUM_INTS,
    U32,
    U64,
    _edited,
    _exp,
    _join,
    _key,
    _key_value,
    _log_total,
    _logprob,
    _mass_high,
    _mass_low,
    _multiply_high,
    _random,
    _reciprocal,
    _scaled,
)


def _draw[
    ALIGN: Int
](
    words: Words, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, lowest: UInt32, min_p: Float32, random: UInt64
) -> Int:
    """Inverse transform sampling in the order of token ids, over the masses that the filters keep.

    The warps sum a 32nd of the segment each, the one in which the random number falls is the next segment.
    """
    var least = min(max(min_p, Float32(0)), Float32(1))  # so that the likeliest token is kept whatever min_p is

    @always_inline
    def kept(logits: SIMD[F32, VEC]) {imm} -> SIMD[F32, VEC]:
        var e = _exp(_scaled(logits, top, inverse))
        return (_key(logits).ge(lowest) & e.ge(least)).select(e, SIMD[F32, VEC](0))

    var start = 0
    var end = v
    var rest = UInt64(0)
    while end - start > VEC:
        var part = ceildiv(ceildiv(end - start, WARPS), VEC) * VEC
        var own_end = min(start + (warp_id() + 1) * part, end)
        var i = start + warp_id() * part + lane_id() * VEC
        var high_sum = SIMD[U32, VEC](0)
        var low_sum = SIMD[U32, VEC](0)
        while i < own_end:
            var e = kept(_load[ALIGN](x, i, own_end))
            var high = _mass_high(e)
            high_sum += high
            low_sum += _mass_low(e, high)
            i += 32 * VEC
        var total = _warp_sum(_join(high_sum.cast[U64]().reduce_add(), low_sum.cast[U64]().reduce_add()))
        if lane_id() == 0:
            _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), total)
        barrier()
        if end - start == v:
            total = _warp_sum(_wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id()))
            rest = _multiply_high(random, total)  # uniform in 0..total-1
        var own = 0
        var mass = _wide(words, WARP_LOWS, WARP_HIGHS)
        while rest >= mass:
            rest -= mass
            own += 1
            mass = _wide(words, WARP_LOWS + own, WARP_HIGHS + own)
        start += own * part
        end = min(start + part, end)
        barrier()
    var e = kept(_load[ALIGN](x, start, end))
    var high = _mass_high(e)
    var mass = (high.cast[U64]() << 20) + _mass_low(e, high).cast[U64]()
    if v <= VEC:
        rest = _multiply_high(random, mass.reduce_add())
    comptime for lane in range(VEC - 1):
        if rest < mass[lane]:
            return start + lane
        rest -= mass[lane]
    return start + VEC - 1


def _choose[ALIGN: Int](words: Words, x: Ptr[F32], v: Int, floats: Ptr[F32], ints: Ptr[DType.int32]) -> Int:
    """The token that the row's parameters pick from the edited logits x."""
    var token = 0
    var top_key = _argmax[ALIGN](words, x, v, token)
    var temperature = floats[unsafe_offset=0]
    if not temperature > 0 or top_key == LOWEST_KEY:
        return token
    var inverse = _reciprocal(temperature)
    var lowest = _filter[ALIGN](words, x, v, top_key, inverse, Int(ints[unsafe_offset=0]), floats[unsafe_offset=1])
    var random = _random(
        bitcast[U32, 1](ints[unsafe_offset=3]),
        bitcast[U32, 1](ints[unsafe_offset=4]),
        bitcast[U32, 1](ints[unsafe_offset=5]),
    )
    return _draw[ALIGN](words, x, v, _key_value(top_key), inverse, lowest, floats[unsafe_offset=2], random)


@__llvm_metadata(MAX_THREADS_PER_BLOCK_METADATA=StaticTuple[Int32, 1](THREADS))  # so that the registers suffice
def _sample_kernel[
    ALIGN: Int
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
    v32: Int32,
):
    comptime assert WARP_SIZE == 32, "a warp holds one value per warp of the block"
    var words = rebind[Words](unsafe_stack_allocation[NUM_WORDS, UInt32, address_space=AddressSpace.SHARED]())
    var v = Int(v32)
    var r = block_idx.x
    var raw = logits.unsafe_offset(r * v)
    var row_ints = ints.unsafe_offset(r * NUM_INTS)
    var x = raw
    var first_edit = Int(edit_starts[unsafe_offset=r])
    var end_edit = Int(edit_starts[unsafe_offset=r + 1])
    if first_edit < end_edit:
        x = scratch.unsafe_offset(r * v)

        def copy(i: Int, values: SIMD[F32, VEC]) {imm}:
            comptime for lane in range(VEC):
                if i + lane < v:
                    x[unsafe_offset=i + lane] = values[lane]

        _each[ALIGN](raw, v, copy)
        barrier()
        for edit in range(first_edit + thread_idx.x, end_edit, THREADS):
            var token_id = Int(edit_ids[unsafe_offset=edit])
            if 0 <= token_id and token_id < v:
                x[unsafe_offset=token_id] = _edited(raw[unsafe_offset=token_id], edit_values, edit)
        barrier()

    var token = _choose[ALIGN](words, x, v, floats.unsafe_offset(r * NUM_FLOATS), row_ints)
    var n = min(Int(row_ints[unsafe_offset=1]), MAX_LOGPROBS)
    if thread_idx.x < MAX_LOGPROBS:
        top_ids[unsafe_offset=r * MAX_LOGPROBS + thread_idx.x] = -1
        top_logprobs[unsafe_offset=r * MAX_LOGPROBS + thread_idx.x] = _key_value(LOWEST_KEY)
    if thread_idx.x == 0:
        token_ids[unsafe_offset=r] = Int32(token)
        logprobs[unsafe_offset=r] = 0
        ranks[unsafe_offset=r] = 0
    if n < 0:
        return
    var target = Int(row_ints[unsafe_offset=2])
    if target < 0 or target >= v:
        target = token
    var likeliest = 0
    var top_key = _argmax[ALIGN](words, raw, v, likeliest)
    var top = _key_value(top_key)
    var log_total = Float32(0)
    if top_key != LOWEST_KEY:
        log_total = _log_total(_total_mass[ALIGN](words, raw, v, top))
    var target_key = _key(raw[unsafe_offset=target])
    var rank = _rank[ALIGN](words, raw, v, target_key)
    if thread_idx.x == 0:
        logprobs[unsafe_offset=r] = _logprob(target_key, top, log_total)
        ranks[unsafe_offset=r] = Int32(rank)
    n = min(n, v)
    if n == 0:
        return
    _list_top[ALIGN](words, raw, v, top_key, n)
    if thread_idx.x < n:  # each entry counts the entries before it, which is its place
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
    rows: Int,
    v: Int,
    ctx: DeviceContext,
) raises:
    """Launches one block per row; rows whose starts are not all 16-byte aligned are read element by element."""
    comptime for aligned in range(2):
        if (v % VEC == 0) == (aligned == 1):
            comptime kernel = _sample_kernel[4 * VEC if aligned == 1 else 4]
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
                Int32(v),
                grid_dim=rows,
                block_dim=THREADS,
            )
