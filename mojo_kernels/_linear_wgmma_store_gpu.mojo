"""How a wgmma tile leaves its registers: straight to y, or by way of shared memory.

Knows the fragment of a wgmma: of a 64 x COLUMNS tile a thread holds, for every 8 columns j, elements 4j..4j+3: two
neighbouring columns of its row, then the same two of the row 8 below. `row` and `column` are those of element 0
within the block's tile.
"""

from ._prelude import *
from .silu_mul import _silu_mul, _silu_mul_f32
from layout import TileTensor
from max.gpu.sync import named_barrier

comptime PAD = 4  # floats between rows of a partial tile: conflict-free writes


@always_inline
def _transpose_quad(v: SIMD[DType.uint32, 4]) -> SIMD[DType.uint32, 4]:
    """Transposes the 4x4 matrix whose column q is lane q's vector, over each four neighbouring lanes."""
    var r = v
    var odd = lane_id() % 2 == 1
    var a = warp.shuffle_xor(r[0] if odd else r[1], 1)
    var b = warp.shuffle_xor(r[2] if odd else r[3], 1)
    if odd:
        r[0] = a
        r[2] = b
    else:
        r[1] = a
        r[3] = b
    var high = lane_id() % 4 >= 2
    a = warp.shuffle_xor(r[0] if high else r[2], 2)
    b = warp.shuffle_xor(r[1] if high else r[3], 2)
    if high:
        r[0] = a
        r[1] = b
    else:
        r[2] = a
        r[3] = b
    return r


# --8<-- [start:gate]
@always_inline
def round_pair(a: Float32, b: Float32) -> UInt32:
    """Rounds two values to bfloat16 in one instruction; one by one it is a conversion each, of which a cycle does few."""
    return bitcast[DType.uint32, 1](SIMD[F32, 2](a, b).cast[BF16]())


@always_inline
def unpack_pair(pair: UInt32) -> SIMD[F32, 2]:
    """As integers, or the compiler would round the two halves apart."""
    return SIMD[F32, 2](bitcast[F32, 1](pair << 16), bitcast[F32, 1](pair & 0xFFFF0000))


@always_inline
def gate_pair(gates: UInt32, ups: UInt32) -> UInt32:
    """Two values of silu(gate) * up."""
    var gated = _silu_mul_f32[2](unpack_pair(gates), unpack_pair(ups))
    return round_pair(gated[0], gated[1])


@always_inline
def gate[COLUMNS: Int](acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...]):
    """Turns a fragment, gate columns and then as many up columns, into silu(gate) * up in its first half."""
    comptime for i in range(0, COLUMNS // 4, 2):
        comptime UP = COLUMNS // 4 + i
        var gates = round_pair(acc[0, i][0], acc[0, i + 1][0])
        var gated = unpack_pair(gate_pair(gates, round_pair(acc[0, UP][0], acc[0, UP + 1][0])))
        acc[0, i] = gated[0]
        acc[0, i + 1] = gated[1]
# --8<-- [end:gate]


@always_inline
def store_swapped[
    out_dtype: DType, has_bias: Bool, GATED: Bool, COLUMNS: Int, OUTPUTS: Int
](
    y: Ptr[out_dtype],
    bias: Ptr[BF16],
    acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...],
    tile: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    row: Int,
    column: Int,
    token_base: Int,
    output_base: Int,
    M: Int,
    N: Int,
):
    """Writes a fragment whose rows are outputs and whose columns are tokens.

    It turns round in shared memory, where also the halves of a gate meet. `tile` may be the ring: it is written when all
    warps of the block have read their last stage.
    """
    comptime THREADS = 2 * OUTPUTS  # a warpgroup for 64 outputs
    var tokens = min(COLUMNS, M - token_base)
    named_barrier[Int32(THREADS)](1)
    comptime for j in range(COLUMNS // 8):
        comptime for e in range(4):
            tile[unsafe_offset=(j * 8 + column + e % 2) * (OUTPUTS + PAD) + row + e // 2 * 8] = acc[0, 4 * j + e][0]
    named_barrier[Int32(THREADS)](1)
    comptime QUADS = OUTPUTS // (2 if GATED else 1) // 4
    comptime AT_ONCE = 4
    for start in range(thread_idx.x, tokens * QUADS, THREADS * AT_ONCE):
        # All in flight before the first is used.
        var sums = Array[SIMD[F32, 4], AT_ONCE](fill=0)
        var ups = Array[SIMD[F32, 4], AT_ONCE](fill=0)
        comptime for u in range(AT_ONCE):
            var i = start + u * THREADS
            if i < tokens * QUADS:
                var at = i // QUADS * (OUTPUTS + PAD) + i % QUADS * 4
                sums[u] = tile.unsafe_load[width=4, alignment=16](at)
                comptime if GATED:
                    ups[u] = tile.unsafe_load[width=4, alignment=16](at + OUTPUTS // 2)
        comptime for u in range(AT_ONCE):
            var i = start + u * THREADS
            var output = output_base + i % QUADS * 4
            if i < tokens * QUADS and output < N:
                comptime if GATED:
                    sums[u] = _silu_mul[BF16, 4](sums[u].cast[BF16](), ups[u].cast[BF16]()).cast[F32]()
                comptime if has_bias:
                    comptime for e in range(4):
                        sums[u][e] += bias[unsafe_offset=min(output + e, N - 1)].cast[F32]()
                var yp = y.unsafe_offset((token_base + i // QUADS) * N + output)
                if N % 4 == 0:
                    yp.unsafe_store[alignment=8](0, sums[u].cast[out_dtype]())
                else:
                    comptime for e in range(4):
                        if output + e < N:
                            yp[unsafe_offset=e] = sums[u][e].cast[out_dtype]()


@always_inline
def store_quad(y: Ptr[BF16], words: SIMD[DType.uint32, 4], token: Int, output: Int, M: Int, N: Int):
    """Writes 32 outputs of a row, rounded, of which this lane has the two at 0, 8, 16 and 24 behind 2 * (lane % 4)."""
    if N % 8 == 0:
        # Four lanes exchange their pairs of columns so that each stores 16 bytes.
        var to = output + lane_id() % 4 * 8
        var quad = _transpose_quad(words)
        if token < M and to < N:
            y.unsafe_offset(token * N + to).unsafe_bitcast[UInt32]().unsafe_store[alignment=16](0, quad)
    elif token < M:
        comptime for i in range(4):
            var pair = bitcast[BF16, 2](words[i])
            var to = output + i * 8 + lane_id() % 4 * 2
            comptime for e in range(2):
                if to + e < N:
                    y[unsafe_offset=token * N + to + e] = pair[e]


@always_inline
def store_rows[
    out_dtype: DType, has_bias: Bool, COLUMNS: Int
](
    y: Ptr[out_dtype],
    bias: Ptr[BF16],
    acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...],
    row: Int,
    column: Int,
    token_base: Int,
    output_base: Int,
    M: Int,
    N: Int,
):
    """Writes a fragment whose rows are tokens and whose columns are outputs."""
    comptime for half in range(2):
        var token = token_base + row + half * 8
        if out_dtype == BF16 and N % 8 == 0:
            # Four lanes exchange their pairs of columns so that each stores 16 bytes.
            var base = output_base + (lane_id() % 4) * 8
            var yp = y.unsafe_offset(token * N + base)
            var left = N - base if token < M else 0
            comptime for j in range(0, COLUMNS // 8, 4):
                var pairs = SIMD[DType.uint32, 4](0)
                comptime for i in range(4):
                    var pair = SIMD[F32, 2](acc[0, 4 * (j + i) + 2 * half][0], acc[0, 4 * (j + i) + 2 * half + 1][0])
                    comptime if has_bias:
                        pair += bias.unsafe_load[width=2](min(output_base + (j + i) * 8 + column, N - 2)).cast[F32]()
                    pairs[i] = bitcast[DType.uint32, 1](pair.cast[BF16]())
                pairs = _transpose_quad(pairs)
                if j * 8 < left:
                    yp.unsafe_offset(j * 8).unsafe_bitcast[UInt32]().unsafe_store[alignment=16](0, pairs)
        elif out_dtype == DType.float32 and N % 2 == 0:
            var base = output_base + column
            var yp = y.unsafe_offset(token * N + base)
            var left = N - base if token < M else 0
            comptime for j in range(COLUMNS // 8):
                var pair = SIMD[F32, 2](acc[0, 4 * j + 2 * half][0], acc[0, 4 * j + 2 * half + 1][0])
                if j * 8 < left:
                    comptime if has_bias:
                        pair += bias.unsafe_load[width=2](base + j * 8).cast[F32]()
                    yp.unsafe_store[alignment=8](j * 8, pair.cast[out_dtype]())
        else:
            var base = output_base + column
            var yp = y.unsafe_offset(token * N + base)
            var left = N - base if token < M else 0
            comptime for j in range(COLUMNS // 8):
                comptime for e in range(2):
                    if j * 8 + e < left:
                        var value = acc[0, 4 * j + 2 * half + e][0]
                        comptime if has_bias:
                            value += bias[unsafe_offset=base + j * 8 + e].cast[F32]()
                        yp[unsafe_offset=j * 8 + e] = value.cast[out_dtype]()
