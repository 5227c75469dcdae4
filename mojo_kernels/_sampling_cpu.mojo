"""CPU path of `mili.sample`, second half: the draw, log-probabilities, and the rows in parallel."""

from ._parallel import for_each
from ._prelude import *
from ._sampling_filter_cpu import CHUNK, W, _each, _filter, _join_lanes, _last, _sum
from ._sampling_math import (
    LOWEST_KEY,
    MAX_LOGPROBS,
    NUM_FLOATS,
    NUM_INTS,
    U32,
    U64,
    _allowed,
    _edited,
    _exp,
    _key,
    _key_value,
    _log_total,
    _logprob,
    _mask_word,
    _mass_high,
    _mass_low,
    _multiply_high,
    _random,
    _reciprocal,
    _scaled,
)


def _top_key(x: Ptr[F32], v: Int) -> UInt32:
    """The largest key of the row."""
    var best = SIMD[U32, W](LOWEST_KEY)

    def body(i: Int, logits: SIMD[F32, W]) {mut best}:
        best = max(best, _key(logits))

    _each(x, 0, v, body)
    return best.reduce_max()


def _first_of(x: Ptr[F32], v: Int, key: UInt32) -> Int:
    """The lowest token id with this key; there must be one."""
    var i = 0
    while i + W <= v and not _key(x.unsafe_load[width=W](i)).eq(key).reduce_or():
        i += W
    while _key[1](x[unsafe_offset=i]) != key:
        i += 1
    return i


def _rank(x: Ptr[F32], v: Int, key: UInt32) -> Int:
    """1 + the number of larger keys."""
    var above = SIMD[U32, W](0)

    def body(i: Int, logits: SIMD[F32, W]) {mut above, imm}:
        above += _key(logits).gt(key).cast[U32]()

    _each(x, 0, v, body)
    return 1 + Int(above.cast[U64]().reduce_add())


def _draw(x: Ptr[F32], v: Int, top: Float32, inverse: Float32, lowest: UInt32, min_p: Float32, random: UInt64) -> Int:
    """Inverse transform sampling in the order of token ids, over the masses that the filters keep."""
    var least = min(max(min_p, Float32(0)), Float32(1))  # so that the likeliest token is kept whatever min_p is

    @always_inline
    def kept(logits: SIMD[F32, W]) {imm} -> SIMD[F32, W]:
        var e = _exp(_scaled(logits, top, inverse))
        return (_key(logits).ge(lowest) & e.ge(least)).select(e, SIMD[F32, W](0))

    var sums = List[UInt64](capacity=ceildiv(v, CHUNK))
    var total = UInt64(0)
    for start in range(0, v, CHUNK):
        var high_sum = SIMD[U32, W](0)
        var low_sum = SIMD[U32, W](0)

        def body(i: Int, logits: SIMD[F32, W]) {mut high_sum, mut low_sum, imm}:
            var e = kept(logits)
            var high = _mass_high(e)
            high_sum += high
            low_sum += _mass_low(e, high)

        _each(x, start, min(start + CHUNK, v), body)
        sums.append(_sum(high_sum, low_sum))
        total += sums[len(sums) - 1]

    var rest = _multiply_high(random, total)  # uniform in 0..total-1
    var chunk = 0
    while rest >= sums[chunk]:
        rest -= sums[chunk]
        chunk += 1
    var i = chunk * CHUNK
    while True:
        var logits = x.unsafe_load[width=W](i) if i + W <= v else _last(x, i, v)
        var e = kept(logits)
        var high = _mass_high(e)
        var mass = _join_lanes(high, _mass_low(e, high))
        for lane in range(W):
            if rest < mass[lane]:
                return i + lane
            rest -= mass[lane]
        i += W


def _total_mass(x: Ptr[F32], v: Int, top: Float32) -> UInt64:
    """The sum of exp(x - top) as a mass."""
    var total = UInt64(0)
    for start in range(0, v, CHUNK):
        var high_sum = SIMD[U32, W](0)
        var low_sum = SIMD[U32, W](0)

        def body(i: Int, logits: SIMD[F32, W]) {mut high_sum, mut low_sum, imm}:
            var e = _exp(_scaled(logits, top, Float32(1)))
            var high = _mass_high(e)
            high_sum += high
            low_sum += _mass_low(e, high)

        _each(x, start, min(start + CHUNK, v), body)
        total += _sum(high_sum, low_sum)
    return total


def _top_tokens(x: Ptr[F32], v: Int, n: Int, keys: Ptr[U32], ids: Ptr[DType.int32]) -> Int:
    """Writes the n likeliest tokens, likeliest first, lowest id first among equals; returns how many there are.

    A sorted list that a token enters only if it beats the last entry, so most groups of W tokens are one comparison.
    """
    var count = 0
    var bar = UInt32(0)

    def body(i: Int, logits: SIMD[F32, W]) {mut count, mut bar, imm}:
        var group = _key(logits)
        if not group.gt(bar).reduce_or():
            return
        for lane in range(min(W, v - i)):
            var key = group[lane]
            if key > bar:
                var at = min(count, n - 1)
                while at > 0 and keys[unsafe_offset=at - 1] < key:
                    keys[unsafe_offset=at] = keys[unsafe_offset=at - 1]
                    ids[unsafe_offset=at] = ids[unsafe_offset=at - 1]
                    at -= 1
                keys[unsafe_offset=at] = key
                ids[unsafe_offset=at] = Int32(i + lane)
                count = min(count + 1, n)
                if count == n:
                    bar = keys[unsafe_offset=n - 1]

    _each(x, 0, v, body)
    return count


def _choose(x: Ptr[F32], v: Int, floats: Ptr[F32], ints: Ptr[DType.int32]) -> Int:
    """The token that the row's parameters pick from the edited logits x."""
    var top_key = _top_key(x, v)
    var temperature = floats[unsafe_offset=0]
    if not temperature > 0 or top_key == LOWEST_KEY:
        return _first_of(x, v, top_key)
    var inverse = _reciprocal(temperature)
    var lowest = _filter(x, v, top_key, inverse, Int(ints[unsafe_offset=0]), floats[unsafe_offset=1])
    var random = _random(
        bitcast[U32, 1](ints[unsafe_offset=3]),
        bitcast[U32, 1](ints[unsafe_offset=4]),
        bitcast[U32, 1](ints[unsafe_offset=5]),
    )
    return _draw(x, v, _key_value(top_key), inverse, lowest, floats[unsafe_offset=2], random)


@always_inline
def _copy_allowed(x: Ptr[F32], raw: Ptr[F32], v: Int, mask: Ptr[DType.int32], num_words: Int):
    """Copies the logits of the tokens that the mask allows; the others become -inf."""
    comptime NONE = SIMD[F32, W](_key_value(LOWEST_KEY))
    for start in range(0, v, 32):
        var word = _mask_word(mask, num_words, start >> 5)
        if start + 32 <= v:
            comptime for at in range(0, 32, W):
                var bits = SIMD[U32, W](word) >> (iota[U32, W]() + UInt32(at))
                var logits = raw.unsafe_load[width=W](start + at)
                x.unsafe_store(start + at, (bits & 1).ne(0).select(logits, NONE))
        else:
            for i in range(start, v):
                x[unsafe_offset=i] = raw[unsafe_offset=i] if _allowed(mask, num_words, i) else NONE[0]


def _sample_cpu(
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
):
    """All rows, one task each."""
    var work = 0  # in bytes as for_each counts them; a draw makes about ten passes over its row
    for r in range(rows):
        work += v * (4 if floats[unsafe_offset=r * NUM_FLOATS] <= 0 else 40)

    def row(r: Int) {var}:
        var raw = logits.unsafe_offset(r * v)
        var row_ints = ints.unsafe_offset(r * NUM_INTS)
        var x = raw
        var edit = Int(edit_starts[unsafe_offset=r])
        var end = Int(edit_starts[unsafe_offset=r + 1])
        var own_mask = Int(row_ints[unsafe_offset=6])
        var masked = 0 <= own_mask and own_mask < num_masks
        if edit < end or masked:
            x = scratch.unsafe_offset(r * v)
            var mask = masks.unsafe_offset(own_mask * num_words if masked else 0)
            if masked:
                _copy_allowed(x, raw, v, mask, num_words)
            else:
                for i in range(v):
                    x[unsafe_offset=i] = raw[unsafe_offset=i]
            while edit < end:
                var token_id = Int(edit_ids[unsafe_offset=edit])
                if 0 <= token_id and token_id < v and (not masked or _allowed(mask, num_words, token_id)):
                    x[unsafe_offset=token_id] = _edited(raw[unsafe_offset=token_id], edit_values, edit)
                edit += 1
        var token = _choose(x, v, floats.unsafe_offset(r * NUM_FLOATS), row_ints)
        token_ids[unsafe_offset=r] = Int32(token)
        logprobs[unsafe_offset=r] = 0
        ranks[unsafe_offset=r] = 0
        var ids = top_ids.unsafe_offset(r * MAX_LOGPROBS)
        var values = top_logprobs.unsafe_offset(r * MAX_LOGPROBS)
        for j in range(MAX_LOGPROBS):
            ids[unsafe_offset=j] = -1
            values[unsafe_offset=j] = _key_value(LOWEST_KEY)
        var n = min(Int(row_ints[unsafe_offset=1]), MAX_LOGPROBS)
        if n < 0:
            return
        var target = Int(row_ints[unsafe_offset=2])
        if target < 0 or target >= v:
            target = token
        var top_key = _top_key(raw, v)
        var top = _key_value(top_key)
        var log_total = Float32(0) if top_key == LOWEST_KEY else _log_total(_total_mass(raw, v, top))
        var target_key = _key[1](raw[unsafe_offset=target])
        logprobs[unsafe_offset=r] = _logprob(target_key, top, log_total)
        ranks[unsafe_offset=r] = Int32(_rank(raw, v, target_key))
        if n > 0:
            var keys = unsafe_stack_allocation[MAX_LOGPROBS, UInt32]()
            for j in range(_top_tokens(raw, v, n, rebind[Ptr[U32]](keys), ids)):
                values[unsafe_offset=j] = _logprob(keys[unsafe_offset=j], top, log_total)

    for_each(row, rows, work)
