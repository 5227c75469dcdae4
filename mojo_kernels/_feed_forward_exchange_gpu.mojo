"""How the blocks of `_feed_forward_gpu` tell each other what they computed: words with a tag, and no barrier over the grid.

A word has 8 bytes, which are written and read as one: two values of bfloat16 and the launch's tag. Who needs it reads it again
until the tag is there. That is one trip through the L2 cache; a barrier over the grid is several, with a fence before it.
All words that a thread waits for are read at once, again and again: one after the other, each would cost a trip of its own.
The tag counts launches. Its place is `exchange[0]`, zero at first; who has seen a word of every block may store the new one.
`exchange` belongs to one stream.
"""

from ._prelude import *

comptime MAX_TOKENS = 4
comptime HEAD = 16  # words before the first value; the first one is the last launch's tag
comptime Exchange = MutPointer[Scalar[DType.uint64], MutAnyOrigin]


@always_inline
def next_tag(exchange: Exchange) -> UInt64:
    """This launch's tag."""
    return (exchange.unsafe_load[volatile=True](0) + 1) & 0xFFFFFFFF


@always_inline
def store_tag(exchange: Exchange, tag: UInt64):
    """For the launch after this one."""
    exchange.unsafe_store[volatile=True](0, tag)


@always_inline
def publish(word: Exchange, values: SIMD[BF16, 2], tag: UInt64):
    """Writes a word."""
    word.unsafe_store[volatile=True](0, tag << 32 | UInt64(bitcast[DType.uint32, 1](values)))


@always_inline
def _read_line(line: Exchange) -> SIMD[DType.uint64, 2]:
    return line.unsafe_load[width=2, alignment=16, volatile=True](0)


@always_inline
def _is_there(line: SIMD[DType.uint64, 2], tag: UInt64) -> Bool:
    return line[0] >> 32 == tag and line[1] >> 32 == tag


@always_inline
def await_lines[
    TOKENS: Int, LINES: Int
](words: Exchange, pitch: Int, m: Int, tag: UInt64) -> Array[SIMD[BF16, 4], TOKENS * LINES]:
    """Four values of two words each, LINES of a row that lie a warp's reach apart, once all are there."""

    @always_inline
    def line(i: Int) {imm} -> Exchange:
        return words.unsafe_offset(min(i // LINES, m - 1) * pitch + i % LINES * 2 * WARP_SIZE)

    comptime COUNT = TOKENS * LINES
    # --8<-- [start:await]
    var v = Array[SIMD[DType.uint64, 2], COUNT](fill=0)
    var waiting = True
    while waiting:
        waiting = False
        comptime for i in range(COUNT):
            v[i] = _read_line(line(i))
        comptime for i in range(COUNT):
            if not _is_there(v[i], tag):
                waiting = True
    # --8<-- [end:await]
    var values = Array[SIMD[BF16, 4], COUNT](fill=0)
    comptime for i in range(COUNT):
        values[i] = bitcast[BF16, 4](SIMD[DType.uint32, 2](v[i][0].cast[DType.uint32](), v[i][1].cast[DType.uint32]()))
    return values^
