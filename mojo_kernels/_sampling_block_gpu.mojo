"""GPU path of `mili.sample`, thread block and cluster: shared memory, reading a row, values agreed on by all threads.

C is the number of blocks in the cluster that owns a row. With C > 1 the blocks deal out the row and combine their values
through each other's shared memory; all of them get the same values and go the same way.
"""

from max.gpu import cluster_sync
from std.atomic import Atomic, Ordering
from std.sys import inlined_assembly

from ._prelude import *
from ._sampling_math import BINS, LOWEST_KEY, MAX_LOGPROBS, U32, U64, _key, _key_value

comptime THREADS = 1024
comptime WARPS = 32
comptime VEC = 4
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
comptime PEER = LIST_LEN + 1  # 64 bits for the other blocks to read
comptime FEW_LEN = PEER + 2
comptime FEW_KEYS = FEW_LEN + 1
comptime FEW = 2048  # candidates at most that a draw is made from here
comptime FEW_IDS = FEW_KEYS + FEW
comptime NUM_WORDS = FEW_IDS + FEW


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
def _rank[C: Int]() -> Int:
    """Which block of the cluster this is."""
    return block_idx.x if C > 1 else 0


@always_inline
def _row_barrier[C: Int]():
    """What the threads of the row wrote before it, to global memory too, they all read after it."""
    comptime if C > 1:
        cluster_sync()
    else:
        barrier()


@always_inline
def _each[Body: def(Int, SIMD[F32, VEC]) -> None, //, ALIGN: Int, C: Int](x: Ptr[F32], v: Int, mut body: Body):
    """Calls body(i, logits i..i+3) for the row, dealt out to all threads of the cluster."""
    comptime STEP = C * THREADS * VEC
    var i = (_rank[C]() * THREADS + thread_idx.x) * VEC
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
def _warp_sum(value: UInt32) -> UInt32:
    var total = value
    comptime for step in range(5):
        total += warp.shuffle_xor(total, UInt32(16 >> step))
    return total


@always_inline
def _shuffle(value: UInt64, offset: Int) -> UInt64:
    var low = warp.shuffle_xor(value.cast[U32](), UInt32(offset))
    var high = warp.shuffle_xor((value >> 32).cast[U32](), UInt32(offset))
    return low.cast[U64]() | (high.cast[U64]() << 32)


@always_inline
def _warp_sum(value: UInt64) -> UInt64:
    var total = value
    comptime for step in range(5):
        total += _shuffle(total, 16 >> step)
    return total


@always_inline
def _warp_max(value: UInt64) -> UInt64:
    var best = value
    comptime for step in range(5):
        best = max(best, _shuffle(best, 16 >> step))
    return best


@always_inline
def _wide(words: Words, low: Int, high: Int) -> UInt64:
    """The 64-bit number whose halves are at two places of shared memory."""
    return words[unsafe_offset=low].cast[U64]() | (words[unsafe_offset=high].cast[U64]() << 32)


@always_inline
def _store_wide(words: Words, low: Int, high: Int, value: UInt64):
    words[unsafe_offset=low] = value.cast[U32]()
    words[unsafe_offset=high] = (value >> 32).cast[U32]()


@always_inline
def _peer(words: Words, at: Int, rank: Int) -> UInt32:
    """The word at the same place in another block of the cluster."""
    return inlined_assembly[
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, $1, $2; ld.shared::cluster.u32 $0, [a]; }",
        UInt32,
        constraints="=r,r,r",
        has_side_effect=True,
    ](Int32(Int(words.unsafe_offset(at))), Int32(rank))


def _of_peers[C: Int](words: Words, value: UInt64) -> UInt64:
    """Lane r gets the value of block r, lanes from C on get 0; value is alike in all threads of a block."""
    if thread_idx.x == 0:
        _store_wide(words, PEER, PEER + 1, value)
    cluster_sync()
    var theirs = UInt64(0)
    if lane_id() < C:
        theirs = _peer(words, PEER, lane_id()).cast[U64]() | (_peer(words, PEER + 1, lane_id()).cast[U64]() << 32)
    cluster_sync()
    return theirs


def _merge[C: Int](words: Words, bins: Int):
    """Ends a histogram: every block gets the sum over the blocks."""
    comptime if C > 1:
        cluster_sync()
        var own = bins + thread_idx.x
        var count = UInt32(0)
        var mass = UInt64(0)
        comptime for r in range(C):
            count += _peer(words, own, r)
            mass += _peer(words, own + BINS, r).cast[U64]() | (_peer(words, own + 2 * BINS, r).cast[U64]() << 32)
        cluster_sync()
        words[unsafe_offset=own] = count
        _store_wide(words, own + BINS, own + 2 * BINS, mass)
    barrier()


def _all_max[C: Int](words: Words, value: UInt64) -> UInt64:
    """The maximum over the cluster."""
    var best = _warp_max(value)
    if lane_id() == 0:
        _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), best)
    barrier()
    best = _warp_max(_wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id()))
    barrier()
    comptime if C > 1:
        best = _warp_max(_of_peers[C](words, best))
    return best


def _block_sum(words: Words, value: UInt64) -> UInt64:
    var total = _warp_sum(value)
    if lane_id() == 0:
        _store_wide(words, WARP_LOWS + warp_id(), WARP_HIGHS + warp_id(), total)
    barrier()
    total = _warp_sum(_wide(words, WARP_LOWS + lane_id(), WARP_HIGHS + lane_id()))
    barrier()
    return total


def _all_sum[C: Int](words: Words, value: UInt64) -> UInt64:
    """The sum over the cluster."""
    var total = _block_sum(words, value)
    comptime if C > 1:
        total = _warp_sum(_of_peers[C](words, total))
    return total


@always_inline
def _fetch_add(words: Words, at: Int, value: UInt32) -> UInt32:
    return Atomic.fetch_add[ordering=Ordering.RELAXED](words.unsafe_offset(at), value)


def _argmax[ALIGN: Int, C: Int](words: Words, x: Ptr[F32], v: Int, mut token: Int) -> UInt32:
    """The largest key; sets token to the lowest id that has it."""
    var best = UInt32(0)
    var best_id = UInt32(0)

    def body(i: Int, logits: SIMD[F32, VEC]) {mut best, mut best_id}:
        var keys = _key(logits)
        comptime for lane in range(VEC):
            if keys[lane] > best:
                best = keys[lane]
                best_id = UInt32(i + lane)

    _each[ALIGN, C](x, v, body)
    # A thread without a token has key 0, below every real one. Of equal keys the lowest id is to win: the highest ~id.
    var top = _all_max[C](words, (best.cast[U64]() << 32) | (~best_id).cast[U64]())
    token = Int(~top.cast[U32]())
    return (top >> 32).cast[U32]()
