"""CPU path of `mili.paged_attention`: online softmax over tiles of 64 keys, merged in chunks of 512.

Tiles and chunks start at absolute positions, and one row's arithmetic does not depend on which other rows share its task. So a row
has the same bits in a whole prompt, in a chunk of it, alone, or in a batch, and whether chunks run one after the other (many tasks
anyway) or side by side (few requests, many cores: split-KV).
"""

from ._attention_chunk_cpu import CHUNK, Attention
from ._attention_tile_cpu import ROWS_QK, TILE, _merge_row
from ._parallel import for_each
from ._prelude import *

comptime QUERY_TILE = 32  # tokens per task


def paged_attention_cpu[dtype: DType, D: Int](
    output: Ptr[dtype],
    q: Ptr[dtype],
    k_layer: Ptr[dtype],
    v_layer: Ptr[dtype],
    page_table: Ptr[DType.int32],
    table_width: Int,
    query_starts: Ptr[DType.int32],
    seq_lens: Ptr[DType.int32],
    num_requests: Int,
    num_q_heads: Int,
    num_kv_heads: Int,
    page_size: Int,
    scale: Float32,
):
    """Attends every row of the batch to the keys of its request up to its own position."""
    var a = Attention[dtype, D](
        rebind[FieldPtr[dtype]](output),
        rebind[FieldPtr[dtype]](q),
        rebind[FieldPtr[dtype]](k_layer),
        rebind[FieldPtr[dtype]](v_layer),
        rebind[FieldPtr[DType.int32]](page_table),
        table_width,
        rebind[FieldPtr[DType.int32]](query_starts),
        rebind[FieldPtr[DType.int32]](seq_lens),
        num_q_heads,
        num_kv_heads,
        page_size,
        scale,
    )
    var group = num_q_heads // num_kv_heads
    # One entry per tile of query tokens: its request and its first row of the batch.
    var tile_request = List[Int]()
    var tile_token = List[Int]()
    var longest = 0
    var work = 0  # bytes of keys and values, a few rows of queries for the price of one
    for b in range(num_requests):
        longest = max(longest, Int(seq_lens[unsafe_offset=b]))
        var rows = Int(query_starts[unsafe_offset=b + 1]) - Int(query_starts[unsafe_offset=b])
        work += ceildiv(rows * group, 2) * Int(seq_lens[unsafe_offset=b]) * num_kv_heads * D * 2 * size_of[dtype]()
        for token in range(Int(query_starts[unsafe_offset=b]), Int(query_starts[unsafe_offset=b + 1]), QUERY_TILE):
            tile_request.append(b)
            tile_token.append(token)
    var tiles = len(tile_token)
    var requests_ptr = rebind[Ptr[DType.int]](tile_request.unsafe_ptr())
    var tokens_ptr = rebind[Ptr[DType.int]](tile_token.unsafe_ptr())
    var chunks = ceildiv(longest, CHUNK)
    var rows_max = QUERY_TILE * group
    var stride = rows_max * (D + 2)  # one partial result: m, l, o

    if chunks == 1 or tiles * num_kv_heads >= 2 * num_physical_cores():

        def tile_head(i: Int) {var}:
            var tile = i // num_kv_heads
            var head = i % num_kv_heads
            var b = Int(requests_ptr[unsafe_offset=tile])
            var token = Int(tokens_ptr[unsafe_offset=tile])
            var tokens = min(QUERY_TILE, Int(a.query_starts[unsafe_offset=b + 1]) - token)
            var rows = tokens * group
            var position = a.first_position(b, token)
            var memory = List[Float32](unsafe_uninit_length=rows * D + (D + ROWS_QK) * TILE + 2 * rows * (D + 2))
            var queries = rebind[Ptr[F32]](memory.unsafe_ptr())
            var work = queries.unsafe_offset(rows * D)
            var m = work.unsafe_offset((D + ROWS_QK) * TILE)
            var l = m.unsafe_offset(rows)
            var o = l.unsafe_offset(rows)
            var part_m = o.unsafe_offset(rows * D)
            var part_l = part_m.unsafe_offset(rows)
            var part_o = part_l.unsafe_offset(rows)
            a.load_queries(queries, token, tokens, head)
            a.chunk(queries, work, m, l, o, rows, b, head, position, 0)
            for start in range(CHUNK, position + tokens, CHUNK):
                a.chunk(queries, work, part_m, part_l, part_o, rows, b, head, position, start)
                for r in range(max(0, (start - position) * group), rows):
                    _merge_row[D](
                        m[unsafe_offset=r],
                        l[unsafe_offset=r],
                        o.unsafe_offset(r * D),
                        part_m[unsafe_offset=r],
                        part_l[unsafe_offset=r],
                        part_o.unsafe_offset(r * D),
                    )
            a.store(l, o, token, tokens, head)

        for_each(tile_head, tiles * num_kv_heads, work)
        _ = tile_request^
        _ = tile_token^
        return

    # Split-KV: chunks of one tile run side by side, then merge in the same order as above.
    var partial = List[Float32](unsafe_uninit_length=tiles * num_kv_heads * chunks * stride)
    var partial_ptr = rebind[Ptr[F32]](partial.unsafe_ptr())

    def tile_head_chunk(i: Int) {var}:
        var tile = i // chunks // num_kv_heads
        var head = i // chunks % num_kv_heads
        var start = i % chunks * CHUNK
        var b = Int(requests_ptr[unsafe_offset=tile])
        var token = Int(tokens_ptr[unsafe_offset=tile])
        var tokens = min(QUERY_TILE, Int(a.query_starts[unsafe_offset=b + 1]) - token)
        var position = a.first_position(b, token)
        if start >= position + tokens:
            return
        var rows = tokens * group
        var memory = List[Float32](unsafe_uninit_length=rows * D + (D + ROWS_QK) * TILE)
        var queries = rebind[Ptr[F32]](memory.unsafe_ptr())
        var m = partial_ptr.unsafe_offset(i * stride)
        a.load_queries(queries, token, tokens, head)
        a.chunk(
            queries,
            queries.unsafe_offset(rows * D),
            m,
            m.unsafe_offset(rows_max),
            m.unsafe_offset(2 * rows_max),
            rows,
            b,
            head,
            position,
            start,
        )

    for_each(tile_head_chunk, tiles * num_kv_heads * chunks, work)

    def merge(i: Int) {var}:
        var tile = i // num_kv_heads
        var b = Int(requests_ptr[unsafe_offset=tile])
        var token = Int(tokens_ptr[unsafe_offset=tile])
        var tokens = min(QUERY_TILE, Int(a.query_starts[unsafe_offset=b + 1]) - token)
        var position = a.first_position(b, token)
        var m = partial_ptr.unsafe_offset(i * chunks * stride)
        var l = m.unsafe_offset(rows_max)
        var o = l.unsafe_offset(rows_max)
        for start in range(CHUNK, position + tokens, CHUNK):
            var part = m.unsafe_offset(start // CHUNK * stride)
            for r in range(max(0, (start - position) * group), tokens * group):
                _merge_row[D](
                    m[unsafe_offset=r],
                    l[unsafe_offset=r],
                    o.unsafe_offset(r * D),
                    part[unsafe_offset=r],
                    part[unsafe_offset=rows_max + r],
                    part.unsafe_offset(2 * rows_max + r * D),
                )
        a.store(l, o, token, tokens, i % num_kv_heads)

    for_each(merge, tiles * num_kv_heads, 2 * tiles * num_kv_heads * chunks * stride)
    # Tasks hold plain pointers into these lists.
    _ = tile_request^
    _ = tile_token^
    _ = partial^
