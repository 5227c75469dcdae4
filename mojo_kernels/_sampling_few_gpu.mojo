"""GPU path of `mili.sample`, the draw from few candidates: when all tokens that the filters can keep fit shared memory.

The first histogram tells how many there are before they are collected. Then every block of the row has all of them and
makes the rest of the decisions, and the row is not read again. Each decision is a search for the first candidate in some
order, by key or by token id, through which a count or a mass is reached; both are sums of integers, so that neither the
list's order nor the number of blocks changes a token.
"""

from max.gpu import cluster_sync

from ._prelude import *
from ._sampling_block_gpu import (
    FEW,
    FEW_IDS,
    FEW_KEYS,
    FEW_LEN,
    LIST_IDS,
    LIST_KEYS,
    OTHER,
    RESULT,
    THREADS,
    VEC,
    WARPS,
    Words,
    _all_max,
    _block_sum,
    _each,
    _fetch_add,
    _peer,
    _rank,
    _store_wide,
    _wide,
)
from ._sampling_filter_gpu import COUNT, MASS, Place, _add, _clear, _find
from ._sampling_math import (
    BINS,
    LOWEST_KEY,
    U64,
    _bin,
    _digit_shift,
    _exp,
    _join,
    _key,
    _key_value,
    _mass_high,
    _mass_low,
    _multiply_high,
    _scaled,
    _top_p_goal,
)


comptime SHORT = 128  # candidates at most that look at each other; for more, digits of keys and ids are searched

comptime _FieldWords = MutPointer[UInt32, MutUntrackedOrigin, address_space=AddressSpace.SHARED]


@fieldwise_init
struct Few(TrivialRegisterPassable):
    """The candidates of one row, in the shared memory of each of its blocks."""

    var _words: _FieldWords
    var len: Int
    var top_key: UInt32
    var inverse: Float32

    @always_inline
    def words(self) -> Words:
        return rebind[Words](self._words)

    @always_inline
    def _key(self, i: Int) -> UInt32:
        return self._words[unsafe_offset=FEW_KEYS + i]

    @always_inline
    def _exp(self, i: Int) -> Float32:
        return _exp[1](_scaled[1](_key_value(self._key(i)), _key_value(self.top_key), self.inverse))

    @always_inline
    def _order[by_id: Bool](self, i: Int) -> UInt32:
        """Of token ids, or of keys from the largest on."""
        return self._words[unsafe_offset=FEW_IDS + i] if by_id else self.top_key - self._key(i)

    def search[
        column: Int, by_id: Bool
    ](self, lowest: UInt32, least: Float32, last: UInt32, goal: UInt64, mut reached: UInt64) -> UInt32:
        """The first order at which count or mass of the candidates up to there reaches goal; sets reached to their mass.

        Candidates with a key below lowest or an exponential below least do not count; no order is larger than last.
        """
        if self.len <= SHORT:
            return self._search_short[column, by_id](lowest, least, goal, reached)
        var from_ = UInt32(0)
        var span = last
        var count = UInt64(0)
        var mass = UInt64(0)
        while True:
            var shift = _digit_shift(span)
            _clear(self.words(), OTHER)
            for i in range(thread_idx.x, self.len, THREADS):
                var digit = self._order[by_id](i) - from_
                var e = self._exp(i)
                if digit <= span and self._key(i) >= lowest and e >= least:
                    _add(self.words(), OTHER, Int(digit >> shift), _mass(e), 1)
            barrier()
            var bin = UInt32(_find[column](self.words(), OTHER, goal, count, mass))
            from_ += bin << shift
            if shift == 0:
                reached = mass + _wide(self.words(), RESULT + 4, RESULT + 5)
                return from_
            span = min(span - (bin << shift), (UInt32(1) << shift) - 1)

    def _search_short[
        column: Int, by_id: Bool
    ](self, lowest: UInt32, least: Float32, goal: UInt64, mut reached: UInt64) -> UInt32:
        """The same by one thread for each candidate, which adds up all that do not come after it."""
        var own = thread_idx.x
        var listed = own < self.len
        var own_order = UInt32(0)
        if listed:
            own_order = self._order[by_id](own)
            var e = self._exp(own)
            var counts = self._key(own) >= lowest and e >= least
            self._words[unsafe_offset=OTHER + own] = UInt32(1) if counts else 0
            _store_wide(self.words(), OTHER + BINS + own, OTHER + 2 * BINS + own, _mass(e) if counts else 0)
        barrier()
        var count = UInt32(0)
        var mass = UInt64(0)
        var through = UInt64(0)
        if listed:
            for i in range(self.len):
                if self._order[by_id](i) <= own_order:
                    count += self._words[unsafe_offset=OTHER + i]
                    mass += _wide(self.words(), OTHER + BINS + i, OTHER + 2 * BINS + i)
            through = mass if column == MASS else count.cast[U64]()
        var reaches = listed and through >= goal
        var first = ~_all_max[1](self.words(), (~own_order).cast[U64]() if reaches else 0).cast[DType.uint32]()
        if reaches and own_order == first:
            _store_wide(self.words(), RESULT + 4, RESULT + 5, mass)
        barrier()
        reached = _wide(self.words(), RESULT + 4, RESULT + 5)
        return first

    def draw(self, v: Int, lowest: UInt32, min_p: Float32, random: UInt64) -> Int:
        """Inverse transform sampling in the order of token ids, as from the whole row."""
        var least = min(max(min_p, Float32(0)), Float32(1))
        var own_mass = UInt64(0)
        for i in range(thread_idx.x, self.len, THREADS):
            var e = self._exp(i)
            if self._key(i) >= lowest and e >= least:
                own_mass += _mass(e)
        var rest = _multiply_high(random, _block_sum(self.words(), own_mass))  # uniform in 0..total-1
        var reached = UInt64(0)
        return Int(self.search[MASS, True](lowest, least, UInt32(v - 1), rest + 1, reached))

    def filter[column: Int](self, top_p: Float32, goal: UInt64) -> UInt32:
        """The lowest key that top_k (column COUNT) and then top_p keep; goal is that of the first of them."""
        var total = UInt64(0)
        var order = self.search[column, False](0, 0, self.top_key - LOWEST_KEY, goal, total)
        if column == COUNT and top_p < 1:
            order = self.search[MASS, False](0, 0, order, _top_p_goal(total, top_p), total)
        return self.top_key - order

    def list_top(self, n: Int):
        """Leaves the n <= len likeliest in LIST_KEYS and LIST_IDS, in order; of equal ones the lowest ids."""
        var mass = UInt64(0)
        var order = self.search[COUNT, False](0, 0, self.top_key - LOWEST_KEY, UInt64(n), mass)
        for i in range(thread_idx.x, self.len, THREADS):
            var key = self._key(i)
            var token_id = self._order[True](i)
            if self.top_key - key > order:
                continue
            var place = 0
            for other in range(self.len):
                var other_key = self._key(other)
                if other_key > key or (other_key == key and self._order[True](other) < token_id):
                    place += 1
            if place < n:
                self._words[unsafe_offset=LIST_KEYS + place] = key
                self._words[unsafe_offset=LIST_IDS + place] = token_id
        barrier()


@always_inline
def _mass(e: Float32) -> UInt64:
    var high = _mass_high(e)
    return _join(high.cast[U64](), _mass_low(e, high).cast[U64]())


@always_inline
def is_few(place: Place) -> Bool:
    """Whether the tokens up to the end of this bin fit."""
    return Int(place.count) + place.num <= FEW


def _collect[
    ALIGN: Int, C: Int
](words: Words, x: Ptr[F32], v: Int, top_key: UInt32, inverse: Float32, last_bin: Int) -> Few:
    """Lists the tokens of bins 0..last_bin; they must be few.

    The last of all bins has no end, and lanes past the row's are listed with it: lowest keys, no mass, and the highest ids.
    """
    if thread_idx.x == 0:
        words[unsafe_offset=FEW_LEN] = 0
    barrier()
    var top = _key_value(top_key)

    def body(i: Int, logits: SIMD[F32, VEC]) {imm}:
        var bin = _bin(_scaled(logits, top, inverse))
        comptime for lane in range(VEC):
            if bin[lane] <= Int32(last_bin):
                var place = Int(_fetch_add(words, FEW_LEN, 1))
                words[unsafe_offset=FEW_KEYS + place] = _key[1](logits[lane])
                words[unsafe_offset=FEW_IDS + place] = UInt32(i + lane)

    _each[ALIGN, C](x, v, body)
    comptime if C == 1:
        barrier()
        return Few(rebind[_FieldWords](words), Int(words[unsafe_offset=FEW_LEN]), top_key, inverse)
    cluster_sync()
    # Behind its own a block puts those of the others, which read only its own; some of its warps fetch from each.
    var from_ = warp_id() % C
    var len = _peer(words, FEW_LEN, lane_id() % C)
    var place = Int(words[unsafe_offset=FEW_LEN])
    var total = 0
    comptime for r in range(C):
        var of_r = Int(warp.shuffle_idx(len, UInt32(r)))
        total += of_r
        if r < from_ and r != _rank[C]():
            place += of_r
    if from_ != _rank[C]():
        var theirs = Int(warp.shuffle_idx(len, UInt32(from_)))
        for i in range(warp_id() // C * WARP_SIZE + lane_id(), theirs, WARPS // C * WARP_SIZE):
            words[unsafe_offset=FEW_KEYS + place + i] = _peer(words, FEW_KEYS + i, from_)
            words[unsafe_offset=FEW_IDS + place + i] = _peer(words, FEW_IDS + i, from_)
    cluster_sync()
    return Few(rebind[_FieldWords](words), total, top_key, inverse)
