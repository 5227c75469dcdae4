"""Which query rows a block of the prefill kernel attends, and in which order.

An item is a tile of query tokens of one request, for one KV head. Its cost is its number of key tiles, the level: items are in
order of level, from the most tiles down, and within a level by request, tile and head. No list of them exists: a warp counts, for
a level, the items of all requests, a lane a request. Requests of fewer than FEWEST tokens, which is 1 or 2, have no items.
"""

from ._paged_attention_gpu_prefill_parts import TILE
from ._prelude import *
from max.gpu import grid_dim


@fieldwise_init
struct _Item(TrivialRegisterPassable):
    """A tile of query tokens of one request, and one KV head."""

    var request: Int
    var first_token: Int  # of the tile, in the batch
    var tokens: Int
    var first_position: Int  # of the tile's first token
    var tiles: Int  # of keys; 0 after the last item
    var seq_len: Int
    var kv_head: Int


@always_inline
def _reaching[
    FEWEST: Int
](level: Int, r: Int, query_starts: Ptr[DType.int32], seq_lens: Ptr[DType.int32], item_tokens: UInt32) -> Int:
    """How many tiles of query tokens of request r have `level` tiles of keys or more."""
    var begin = Int(query_starts[unsafe_offset=r])
    var tokens = Int(query_starts[unsafe_offset=r + 1]) - begin
    var first_position = Int(seq_lens[unsafe_offset=r]) - tokens
    var token = max((level - 1) * TILE - first_position, 0)
    if tokens < FEWEST or token >= tokens:
        return 0
    return Int((UInt32(tokens) + item_tokens - 1) // item_tokens - UInt32(token) // item_tokens)


@always_inline
def _top[
    FEWEST: Int
](below: Int, r: Int, query_starts: Ptr[DType.int32], seq_lens: Ptr[DType.int32], item_tokens: UInt32) -> Int:
    """The largest number of key tiles under `below` that a tile of request r has."""
    var begin = Int(query_starts[unsafe_offset=r])
    var tokens = Int(query_starts[unsafe_offset=r + 1]) - begin
    var seq_len = Int(seq_lens[unsafe_offset=r])
    var least = seq_len - tokens + min(Int(item_tokens), tokens) - 1
    return 0 if tokens < FEWEST or least // TILE + 1 >= below else min(below - 1, ceildiv(seq_len, TILE))


@always_inline
def _find[
    FEWEST: Int
](
    round: Int,
    mut level: Int,
    mut above: Int,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int32,
    kv_heads: Int,
    item_tokens: UInt32,
) -> _Item:
    """The block's item of a round: items are dealt longest first, forth and back over the blocks.

    All lanes of a warp call it, for one round after the other or some of them. It keeps in `level` how many tiles of keys the
    items have that it is at, 0 before the first, and in `above` how many items have more. A tile has `item_tokens` tokens.
    """
    var lane = lane_id()
    var blocks = grid_dim.x
    var index = round * blocks + (blocks - 1 - block_idx.x if round & 1 else block_idx.x)
    while True:
        var count = Int32(0)
        var lower = Int32(0)
        for r in range(lane, Int(num_requests), WARP_SIZE):
            count += Int32(_reaching[FEWEST](level, r, query_starts, seq_lens, item_tokens)) if level > 0 else 0
            var below = level if level > 0 else 1 << 30
            lower = max(lower, Int32(_top[FEWEST](below, r, query_starts, seq_lens, item_tokens)))
        var here = Int(warp.sum(count)) * kv_heads
        if index < here:
            break
        above = here
        level = Int(warp.max(lower))
        if level == 0:
            return _Item(0, 0, 0, 0, 0, 0, 0)
    var nth = Int32(UInt32(index - above) // UInt32(kv_heads))
    var base = 0
    while True:
        var r = min(base + lane, Int(num_requests) - 1)
        var count = Int32(
            _reaching[FEWEST](level, r, query_starts, seq_lens, item_tokens)
            - _reaching[FEWEST](level + 1, r, query_starts, seq_lens, item_tokens)
        ) if base + lane < Int(num_requests) else 0
        var sum = warp.prefix_sum(count)
        var total = warp.shuffle_idx(sum, UInt32(WARP_SIZE - 1))
        if nth < total:
            var owner = warp.sum(Int32(sum <= nth))
            nth -= warp.shuffle_idx(sum - count, UInt32(owner))
            base += Int(owner)
            break
        nth -= total
        base += WARP_SIZE
    var begin = Int(query_starts[unsafe_offset=base])
    var tokens = Int(query_starts[unsafe_offset=base + 1]) - begin
    var seq_len = Int(seq_lens[unsafe_offset=base])
    var tile = Int((UInt32(tokens) + item_tokens - 1) // item_tokens) - _reaching[FEWEST](
        level, base, query_starts, seq_lens, item_tokens
    )
    var first = (tile + Int(nth)) * Int(item_tokens)
    return _Item(
        base,
        begin + first,
        min(Int(item_tokens), tokens - first),
        seq_len - tokens + first,
        level,
        seq_len,
        Int(UInt32(index - above) % UInt32(kv_heads)),
    )
