"""One chunk of keys against one tile of query rows: the unit of work of the CPU's attention.

Knows the op's arguments and one KV head of one request at a time; which tiles and chunks there are, and how partial results merge, is
`_paged_attention_cpu`'s.
"""

from ._attention_tile_cpu import LOWEST, ROWS_PV, ROWS_QK, TILE, W, _accumulate, _load_keys, _scores, _softmax_row
from ._prelude import *

comptime CHUNK = 512  # keys per partial result; a multiple of TILE


@fieldwise_init
struct Attention[dtype: DType, D: Int](Copyable, ImplicitlyCopyable, Movable):
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
