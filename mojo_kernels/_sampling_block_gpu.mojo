"""GPU path of `mili.sample`, the thread block: shared memory, reading a row, values agreed on by all threads."""

from std.atomic import Atomic, Ordering

from ._prelude import *
from ._sampling_math import BINS, LOWEST_KEY, MAX_LOGPROBS, U32, U64, _key, _key_value

comptime THREADS = 1024
comptime WARPS = 32
comptime VEC = 4
comptime STEP = THREADS * VEC
comptime UNROLL = 4  # loads in flight per thread

# Shared memory, in words of 32 bits. A histogram is three arrays: counts, and masses as a low and a high word.
comptime Words = MutPointer[UInt32, MutAnyOrigin, address_space=AddressSpace.SHARED]
comptime FIRST = 0
comptime OTHER = 3 * BINS
comptime WARP_COUNTS = 6 * BINS  # per-warp values on their way to a block-wide one
comptime WARP_LOWS = WARP_COUNTS + WARPS
comptime WARP_HIGHS = WARP_LOWS + WARPS
comptime RESULT = WARP_HIGHS + WARPS  # of a search: bin, count before it, mass before it (2), mass in it (2), keys (2)
comptime LIST_KEYS = RESULT + 8
comptime LIST_IDS = LIST_KEYS + MAX_LOGPROBS
comptime LIST_LEN = LIST_IDS + MAX_LOGPROBS
comptime NUM_WORDS = LIST_LEN + 1


@always_inline
def _load[ALIGN: Int](x: Ptr[F32], i: Int, end: Int) -> SIMD[F32, VEC]:
    """Logits i..i+3; lanes past the end read -inf, which is never counted, chosen or ranked."""
    if i + VEC <= end:
        return x.unsafe_load[width=VEC, alignment=ALIGN](i)
    var logits = SIMD[F32, VEC](_key_value(LOWEST_KEY))
    comptime for lane in range(VEC - 1):
        if i + lane < end:
            logits[lane] = x[unsafe_offset=i + lane]
    return logits


@always_inline
def _each[Body: def(Int, SIMD[F32, VEC]) -> None, //, ALIGN: Int](x: Ptr[F32], v: Int, mut body: Body):
    """Calls body(i, logits i..i+3) for the row, dealt out to all threads."""
    var i = thread_idx.x * VEC
    while i + (UNROLL - 1) * STEP + VEC <= v:
        var loads = Array[SIMD[F32, VEC], UNROLL](fill=0)
        comptime for u in range(UNROLL):
            loads[u] = x.unsafe_load[width=VEC, alignment=ALIGN](i + u * STEP)
        comptime for u in range(UNROLL):
            body(i + u * STEP, loads[u])
        i += UNROLL * STEP
    while i < v:
        body(i, _load[ALIGN](x, i, v))
        i += STEP


@always_inline
def _warp_max(value: UInt32) -> UInt32:
    var best = value
    comptime for step in range(5):
        best = max(best, warp.shuffle_xor(best, UInt32(16 >> step)))
    return best


@always_inline
def _warp_sum(value: UInt32) -> UInt32:
    var total = value
    comptime for step in range(5):
        total += warp.shuffle_xor(total, UInt32(16 >> step))
    return total


@always_inline
def _warp_sum(value: UInt64) -> UInt64:
    var total = value
    comptime for step in range(5):
        var low = warp.shuffle_xor(total.cast[U32](), UInt32(16 >> step))
        var high = warp.shuffle_xor((total >> 32).cast[U32](), UInt32(16 >> step))
        total += low.cast[U64]() | (high.cast[U64]() << 32)
    return total


@always_inline
def _wide(words: Words, low: Int, high: Int) -> UInt64:
    """The 64-bit number whose halves are at two places of shared memory."""
    return words[unsafe_offset=low].cast[U64]() | (words[unsafe_offset=high].cast[U64]() << 32)


@always_inline
def _store_wide(words: Words, low: Int, high: Int, value: UInt64):
    words[unsafe_offset=low] = value.cast[U32]()
    words[unsafe_offset=high] = (value >> 32).cast[U32]()


def _block_max(words: Words, value: UInt32) -> UInt32:
    var best = _warp_max(value)
    if lane_id() == 0:
        words[unsafe_offset=WARP_COUNTS + warp_id()] = best
    barrier()
    best = _warp_max(words[unsafe_offset=WARP_COUNTS + lane_id()])
    barrier()
    return best


def _block_min(words: Words, value: UInt32) -> UInt32:
    return ~_block_max(words, ~value)


def _block_sum(words: Words, value: UInt64) -> UInt64:
    var total = _warp_sum(value)
    if lane_id() == 0:
        _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), total)
    barrier()
    total = _warp_sum(_wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id()))
    barrier()
    return total


@always_inline
def _fetch_add(words: Words, at: Int, value: UInt32) -> UInt32:
    return Atomic.fetch_add[ordering=Ordering.RELAXED](words.unsafe_offset(at), value)


def _argmax[ALIGN: Int](words: Words, x: Ptr[F32], v: Int, mut token: Int) -> UInt32:
    """The largest key; sets token to the lowest id that has it."""
    var best = UInt32(0)
    var best_id = UInt32(0xFFFFFFFF)

    def body(i: Int, logits: SIMD[F32, VEC]) {mut best, mut best_id}:
        var keys = _key(logits)
        comptime for lane in range(VEC):
            if keys[lane] > best:
                best = keys[lane]
                best_id = UInt32(i + lane)

    _each[ALIGN](x, v, body)
    var top = _block_max(words, best)
    token = Int(_block_min(words, best_id if best == top else UInt32(0xFFFFFFFF)))
    return top
