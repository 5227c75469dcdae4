"""CPU path of `mili.paged_attention`: online softmax over tiles of 64 keys, merged in chunks of 512.

Tiles and chunks start at absolute positions, and one row's arithmetic does not depend on which other rows share its task. So a row
has the same bits in a whole prompt, in a chunk of it, alone, or in a batch, and whether chunks run one after the other (many tasks
anyway) or side by side (few requests, many cores: split-KV).
"""

from ._parallel import for_each
from ._prelude import *

comptime W = min(simd_width_of[F32](), 16)
comptime TILE = 64  # keys per softmax step
comptime CHUNK = 512  # keys per partial result; a multiple of TILE
comptime QUERY_TILE = 32  # tokens per task
comptime LOWEST = Float32.MIN_FINITE
comptime ROWS_QK = 4  # query rows per register tile of q k^T
comptime ROWS_PV = 2  # and of p v


@always_inline
def _load_keys[dtype: DType, D: Int, PW: Int](
    keys: Ptr[F32], k_layer: Ptr[dtype], pages: Ptr[DType.int32], head: Int, num_kv_heads: Int, page_size: Int, first: Int, end: Int
):
    """Widens keys [first, end) of one head to keys[d][0..TILE); PW keys (at most a page) move at a time."""
    var at = first
    while at < end:
        var page = Int(pages[unsafe_offset=at // page_size])
        var source = k_layer.unsafe_offset((page * num_kv_heads + head) * page_size * D + at % page_size)
        for d in range(D):
            keys.unsafe_store(d * TILE + at - first, source.unsafe_load[width=PW](d * page_size).cast[F32]())
        at += PW


@always_inline
def _scores[D: Int, ROWS: Int](scores: Ptr[F32], q: Ptr[F32], keys: Ptr[F32]):
    """Computes scores[r][j] = sum_d q[r][d] keys[d][j] for a whole tile of keys."""
    comptime VECS = TILE // W
    comptime HALF = 2 if W < 16 else 1  # narrow vectors: fewer accumulators at a time
    comptime N = VECS // HALF
    comptime for part in range(HALF):
        var acc = Array[SIMD[F32, W], ROWS * N](fill=0)
        for d in range(D):
            comptime for v in range(N):
                var key = keys.unsafe_load[width=W](d * TILE + (part * N + v) * W)
                comptime for r in range(ROWS):
                    acc[r * N + v] = key.fma(SIMD[F32, W](q[unsafe_offset=r * D + d]), acc[r * N + v])
        comptime for r in range(ROWS):
            comptime for v in range(N):
                scores.unsafe_store(r * TILE + (part * N + v) * W, acc[r * N + v])


@always_inline
def _softmax_row(scores: Ptr[F32], valid: Int, mut m: Float32, mut l: Float32) -> Float32:
    """Turns one row of scores into weights in place, masked past `valid`; returns the factor for what came before."""
    var lanes = SIMD[F32, W](0)
    comptime for i in range(W):
        lanes[i] = Float32(i)
    var top = SIMD[F32, W](LOWEST)
    comptime for v in range(TILE // W):
        var s = scores.unsafe_load[width=W](v * W)
        s = (lanes + Float32(v * W)).lt(Float32(valid)).select(s, SIMD[F32, W](LOWEST))
        scores.unsafe_store(v * W, s)
        top = max(top, s)
    var new_m = max(m, top.reduce_max())
    var total = SIMD[F32, W](0)
    comptime for v in range(TILE // W):
        var p = exp(scores.unsafe_load[width=W](v * W) - new_m)
        p = (lanes + Float32(v * W)).lt(Float32(valid)).select(p, SIMD[F32, W](0))
        scores.unsafe_store(v * W, p)
        total += p
    var factor = exp(m - new_m)
    l = l * factor + total.reduce_add()
    m = new_m
    return factor


@always_inline
def _accumulate[dtype: DType, D: Int, ROWS: Int](
    o: Ptr[F32],
    weights: Ptr[F32],
    factors: Ptr[F32],
    v_layer: Ptr[dtype],
    pages: Ptr[DType.int32],
    head: Int,
    num_kv_heads: Int,
    page_size: Int,
    first: Int,
    end: Int,
):
    """Computes o[r] = o[r] * factors[r] + sum_j weights[r][j] v[first + j]; keys from `end` on are never read."""
    comptime VECS = D // W
    comptime PARTS = 1 if W >= 16 else 2
    comptime N = VECS // PARTS
    comptime for part in range(PARTS):
        var acc = Array[SIMD[F32, W], ROWS * N](fill=0)
        comptime for r in range(ROWS):
            comptime for v in range(N):
                acc[r * N + v] = o.unsafe_load[width=W](r * D + (part * N + v) * W) * factors[unsafe_offset=r]
        var at = first
        while at < end:
            var page = Int(pages[unsafe_offset=at // page_size])
            var offset = at % page_size
            var stop = min(page_size, offset + end - at)
            var rows = v_layer.unsafe_offset((page * num_kv_heads + head) * page_size * D + part * N * W)
            for j in range(offset, stop):
                comptime for v in range(N):
                    var value = rows.unsafe_load[width=W](j * D + v * W).cast[F32]()
                    comptime for r in range(ROWS):
                        var p = SIMD[F32, W](weights[unsafe_offset=r * TILE + at - first + j - offset])
                        acc[r * N + v] = value.fma(p, acc[r * N + v])
            at += stop - offset
        comptime for r in range(ROWS):
            comptime for v in range(N):
                o.unsafe_store(r * D + (part * N + v) * W, acc[r * N + v])


@always_inline
def _merge_row[D: Int](
    mut m: Float32, mut l: Float32, o: Ptr[F32], part_m: Float32, part_l: Float32, part_o: Ptr[F32]
):
    """Folds the result of a later chunk of keys into the result of the earlier ones."""
    var new_m = max(m, part_m)
    var a = exp(m - new_m)
    var b = exp(part_m - new_m)
    comptime for v in range(D // W):
        o.unsafe_store(v * W, o.unsafe_load[width=W](v * W) * a + part_o.unsafe_load[width=W](v * W) * b)
    m = new_m
    l = l * a + part_l * b


@fieldwise_init
struct _Attention[dtype: DType, D: Int](Copyable, ImplicitlyCopyable, Movable):
    """The arguments of the op that every task reads."""

    var output: FieldPtr[Self.dtype]
    var q: FieldPtr[Self.dtype]
    var k_layer: FieldPtr[Self.dtype]
    var v_layer: FieldPtr[Self.dtype]
    var page_table: FieldPtr[DType.int32]
    var table_width: Int
    var query_starts: FieldPtr[DType.int32]
    var seq_lens: FieldPtr[DType.int32]
    var num_q_heads: Int
    var num_kv_heads: Int
    var page_size: Int
    var scale: Float32

    def first_position(self, request: Int, token: Int) -> Int:
        """Position in its request of a token given by its row in the batch."""
        return Int(self.seq_lens[unsafe_offset=request]) - Int(self.query_starts[unsafe_offset=request + 1]) + token

    def load_queries(self, q: Ptr[F32], token: Int, tokens: Int, head: Int):
        """Widens and scales the query rows of a tile: q[token][head in group][D]."""
        var group = self.num_q_heads // self.num_kv_heads
        for j in range(tokens):
            for g in range(group):
                var row = self.q.unsafe_offset(((token + j) * self.num_q_heads + head * group + g) * Self.D)
                comptime for v in range(Self.D // W):
                    var x = row.unsafe_load[width=W](v * W).cast[F32]() * self.scale
                    q.unsafe_store((j * group + g) * Self.D + v * W, x)

    def chunk(
        self,
        q: Ptr[F32],
        work: Ptr[F32],  # [D][TILE] keys, then [ROWS_QK][TILE] scores
        m: Ptr[F32],
        l: Ptr[F32],
        o: Ptr[F32],
        rows: Int,
        request: Int,
        head: Int,
        position: Int,
        start: Int,
    ):
        """Attends `rows` rows, the first at `position`, to keys [start, start + CHUNK) of their request: m, l [rows], o [rows][D]."""
        var group = self.num_q_heads // self.num_kv_heads
        var keys = work
        var scores = work.unsafe_offset(Self.D * TILE)
        var pages = rebind[Ptr[DType.int32]](self.page_table.unsafe_offset(request * self.table_width))
        for r in range(rows):
            m[unsafe_offset=r] = LOWEST
            l[unsafe_offset=r] = 0
            comptime for v in range(Self.D // W):
                o.unsafe_store(r * Self.D + v * W, SIMD[F32, W](0))
        var chunk_end = min(start + CHUNK, position + (rows - 1) // group + 1)
        var factors = Array[Float32, ROWS_QK](fill=1)
        var factors_ptr = rebind[Ptr[F32]](factors.unsafe_ptr())
        for first in range(start, chunk_end, TILE):
            var end = min(first + TILE, chunk_end)
            self.load_keys(keys, pages, head, first, end)
            # Rows before this one end before the tile begins.
            var row = max(0, (first - position) * group) // ROWS_QK * ROWS_QK
            while row < rows:
                var count = min(ROWS_QK, rows - row)
                if count == ROWS_QK:
                    _scores[Self.D, ROWS_QK](scores, q.unsafe_offset(row * Self.D), keys)
                else:
                    for r in range(count):
                        _scores[Self.D, 1](scores.unsafe_offset(r * TILE), q.unsafe_offset((row + r) * Self.D), keys)
                for r in range(count):
                    var valid = min(position + (row + r) // group + 1, end) - first
                    factors_ptr[unsafe_offset=r] = 1
                    if valid > 0:
                        factors_ptr[unsafe_offset=r] = _softmax_row(
                            scores.unsafe_offset(r * TILE), valid, m[unsafe_offset=row + r], l[unsafe_offset=row + r]
                        )
                    else:
                        comptime for v in range(TILE // W):
                            scores.unsafe_store(r * TILE + v * W, SIMD[F32, W](0))
                var done = 0
                while done + ROWS_PV <= count:
                    self.accumulate[ROWS_PV](o, scores, factors_ptr, pages, head, row, done, first, end)
                    done += ROWS_PV
                if done < count:
                    self.accumulate[1](o, scores, factors_ptr, pages, head, row, done, first, end)
                row += count

    @always_inline
    def load_keys(self, keys: Ptr[F32], pages: Ptr[DType.int32], head: Int, first: Int, end: Int):
        """Picks the widest vector of keys that a page holds."""
        comptime for bits in range(5):
            comptime PW = 1 << bits
            if self.page_size == PW or (PW == 16 and self.page_size > PW):
                _load_keys[Self.dtype, Self.D, PW](
                    keys, rebind[Ptr[Self.dtype]](self.k_layer), pages, head, self.num_kv_heads, self.page_size, first, end
                )

    @always_inline
    def accumulate[ROWS: Int](
        self,
        o: Ptr[F32],
        scores: Ptr[F32],
        factors: Ptr[F32],
        pages: Ptr[DType.int32],
        head: Int,
        row: Int,
        done: Int,
        first: Int,
        end: Int,
    ):
        """Adds p v of ROWS rows, `done` rows into a group of scores."""
        _accumulate[Self.dtype, Self.D, ROWS](
            o.unsafe_offset((row + done) * Self.D),
            scores.unsafe_offset(done * TILE),
            factors.unsafe_offset(done),
            rebind[Ptr[Self.dtype]](self.v_layer),
            pages,
            head,
            self.num_kv_heads,
            self.page_size,
            first,
            end,
        )

    def store(self, l: Ptr[F32], o: Ptr[F32], token: Int, tokens: Int, head: Int):
        """Writes o / l, rounded once."""
        var group = self.num_q_heads // self.num_kv_heads
        for j in range(tokens):
            for g in range(group):
                var r = j * group + g
                var row = self.output.unsafe_offset(((token + j) * self.num_q_heads + head * group + g) * Self.D)
                var scale = 1 / l[unsafe_offset=r]
                comptime for v in range(Self.D // W):
                    row.unsafe_store(v * W, (o.unsafe_load[width=W](r * Self.D + v * W) * scale).cast[Self.dtype]())


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
    var a = _Attention[dtype, D](
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
