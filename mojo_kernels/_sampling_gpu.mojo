"""GPU path of `mili.sample`: one thread block or cluster per row, which makes the passes of the CPU path with 1024 threads a block.

All threads of a row follow the same decisions, which they read from shared memory, so every barrier is met by all. How many
blocks share a row depends on the number of rows, the result does not: every decision is made in integers.
"""

from max.gpu import MAX_THREADS_PER_BLOCK_METADATA
from max.gpu.host import Dim
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
    _block_sum,
    _each,
    _load,
    _of_peers,
    _rank,
    _row_barrier,
    _store_wide,
    _warp_sum,
    _wide,
)
from ._sampling_filter_gpu import _filter
from ._sampling_logprobs_gpu import _list_top, _rank_of, _total_mass
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
    ALIGN: Int, C: Int
](
    words: Words, x: Ptr[F32], v: Int, top: Float32, inverse: Float32, lowest: UInt32, min_p: Float32, random: UInt64
) -> Int:
    """Inverse transform sampling in the order of token ids, over the masses that the filters keep.

    The blocks of a cluster sum one part of the row each, and all go on in the part in which the random number falls. There the
    warps sum a 32nd of the segment each, the one in which the number falls is the next segment.
    """
    var least = min(max(min_p, Float32(0)), Float32(1))  # so that the likeliest token is kept whatever min_p is

    @always_inline
    def kept(logits: SIMD[F32, VEC]) {imm} -> SIMD[F32, VEC]:
        var e = _exp(_scaled(logits, top, inverse))
        return (_key(logits).ge(lowest) & e.ge(least)).select(e, SIMD[F32, VEC](0))

    @always_inline
    def mass_of(start: Int, end: Int, step: Int) {imm} -> UInt64:
        """What the logits start..start+3, those step later and so on weigh together."""
        var i = start
        var high_sum = SIMD[U32, VEC](0)
        var low_sum = SIMD[U32, VEC](0)
        while i < end:
            var e = kept(_load[ALIGN](x, i, end))
            var high = _mass_high(e)
            high_sum += high
            low_sum += _mass_low(e, high)
            i += step
        return _join(high_sum.cast[U64]().reduce_add(), low_sum.cast[U64]().reduce_add())

    var start = 0
    var end = v
    var rest = UInt64(0)
    comptime if C > 1:
        var part = ceildiv(ceildiv(v, C), VEC) * VEC
        var first = _rank[C]() * part
        var own_mass = mass_of(first + thread_idx.x * VEC, min(first + part, v), THREADS * VEC)
        var masses = _of_peers[C](words, _block_sum(words, own_mass))
        rest = _multiply_high(random, _warp_sum(masses))  # uniform in 0..total-1
        if thread_idx.x < C:
            _store_wide(words, WARP_LOWS + thread_idx.x, WARP_HIGHS + thread_idx.x, masses)
        barrier()
        var mass = _wide(words, WARP_LOWS, WARP_HIGHS)
        while rest >= mass:
            rest -= mass
            start += 1
            mass = _wide(words, WARP_LOWS + start, WARP_HIGHS + start)
        barrier()
        start *= part
        end = min(start + part, v)
    while end - start > VEC:
        var part = ceildiv(ceildiv(end - start, WARPS), VEC) * VEC
        var own_end = min(start + (warp_id() + 1) * part, end)
        var total = _warp_sum(mass_of(start + warp_id() * part + lane_id() * VEC, own_end, 32 * VEC))
        if lane_id() == 0:
            _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), total)
        barrier()
        if C == 1 and end - start == v:
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
    if C == 1 and v <= VEC:
        rest = _multiply_high(random, mass.reduce_add())
    comptime for lane in range(VEC - 1):
        if rest < mass[lane]:
            return start + lane
        rest -= mass[lane]
    return start + VEC - 1


def _choose[ALIGN: Int, C: Int](words: Words, x: Ptr[F32], v: Int, floats: Ptr[F32], ints: Ptr[DType.int32]) -> Int:
    """The token that the row's parameters pick from the edited logits x."""
    var token = 0
    var top_key = _argmax[ALIGN, C](words, x, v, token)
    var temperature = floats[unsafe_offset=0]
    if not temperature > 0 or top_key == LOWEST_KEY:
        return token
    var inverse = _reciprocal(temperature)
    var lowest = _filter[ALIGN, C](words, x, v, top_key, inverse, Int(ints[unsafe_offset=0]), floats[unsafe_offset=1])
    var random = _random(
        bitcast[U32, 1](ints[unsafe_offset=3]),
        bitcast[U32, 1](ints[unsafe_offset=4]),
        bitcast[U32, 1](ints[unsafe_offset=5]),
    )
    return _draw[ALIGN, C](words, x, v, _key_value(top_key), inverse, lowest, floats[unsafe_offset=2], random)


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
    if first_edit < end_edit:
        x = scratch.unsafe_offset(r * v)

        def copy(i: Int, values: SIMD[F32, VEC]) {imm}:
            comptime for lane in range(VEC):
                if i + lane < v:
                    x[unsafe_offset=i + lane] = values[lane]

        _each[ALIGN, C](raw, v, copy)
        _row_barrier[C]()
        for edit in range(first_edit + _rank[C]() * THREADS + thread_idx.x, end_edit, C * THREADS):
            var token_id = Int(edit_ids[unsafe_offset=edit])
            if 0 <= token_id and token_id < v:
                x[unsafe_offset=token_id] = _edited(raw[unsafe_offset=token_id], edit_values, edit)
        _row_barrier[C]()

    var token = _choose[ALIGN, C](words, x, v, floats.unsafe_offset(r * NUM_FLOATS), row_ints)
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
    var likeliest = 0
    var top_key = _argmax[ALIGN, C](words, raw, v, likeliest)
    var top = _key_value(top_key)
    var log_total = Float32(0)
    if top_key != LOWEST_KEY:
        log_total = _log_total(_total_mass[ALIGN, C](words, raw, v, top))
    var target_key = _key(raw[unsafe_offset=target])
    var rank = _rank_of[ALIGN, C](words, raw, v, target_key)
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
            Int32(v),
            grid_dim=(C, rows),
            block_dim=THREADS,
            cluster_dim=Dim(C, 1, 1),
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    # A multiprocessor holds one block: as many to a row as keep all of them busy at once.
    if v % VEC != 0:
        launch[4, 1]()
    elif rows <= 16:
        launch[4 * VEC, 8]()
    elif rows <= 64:
        launch[4 * VEC, 2]()
    else:
        launch[4 * VEC, 1]()
