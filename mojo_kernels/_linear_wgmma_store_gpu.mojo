"""How a wgmma tile leaves its registers: straight to y, or as a partial tile that the blocks of a cluster sum.

Knows the fragment of a wgmma: of a 64 x COLUMNS tile a thread holds, for every 8 columns j, elements 4j..4j+3: two
neighbouring columns of its row, then the same two of the row 8 below. `row` and `column` are those of element 0
within the block's tile.
"""

from ._prelude import *
from .silu_mul import _silu_mul
from layout import TileTensor
from std.sys import inlined_assembly
from std.sys.intrinsics import _RegisterPackType

comptime PAD = 4  # floats between rows of a partial tile: conflict-free writes


@always_inline
def _load_peer(address: UInt32, rank: Int) -> SIMD[F32, 4]:
    """Loads 16 bytes from the same shared-memory address of another block of the cluster."""
    var r = inlined_assembly[
        "{ .reg .b32 ra; mapa.shared::cluster.u32 ra, $4, $5; ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [ra]; }",
        _RegisterPackType[Float32, Float32, Float32, Float32],
        constraints="=f,=f,=f,=f,r,r",
        has_side_effect=True,
    ](address, UInt32(rank))
    return SIMD[F32, 4](r[0], r[1], r[2], r[3])


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
def gate[COLUMNS: Int](acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...]):
    """Turns a fragment, gate columns and then as many up columns, into silu(gate) * up in its first half."""
    comptime for i in range(COLUMNS // 4):
        acc[0, i] = _silu_mul[BF16, 1](acc[0, i][0].cast[BF16](), acc[0, COLUMNS // 4 + i][0].cast[BF16]()).cast[F32]()
# --8<-- [end:gate]


@always_inline
def sum_ranks[
    out_dtype: DType, has_bias: Bool, GATED: Bool, SPLIT: Int, OUTPUTS: Int, THREADS: Int
](
    y: Ptr[out_dtype],
    bias: Ptr[BF16],
    own: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    rank: Int,
    tokens: Int,
    token_base: Int,
    output_base: Int,
    N: Int,
):
    """Writes this rank's share of a tile: the sums, in rank order, of the cluster's partial tiles.

    A gated tile holds OUTPUTS / 2 gates and then their up projections: y gets silu(gate) * up.
    """
    comptime HALVES = 2 if GATED else 1
    comptime QUADS = OUTPUTS // HALVES // 4
    var part = UInt32(Int(own))
    var begin = tokens * rank // SPLIT
    var count = tokens * (rank + 1) // SPLIT - begin
    for i in range(thread_idx.x, count * QUADS, THREADS):
        var token = begin + i // QUADS
        var quad = i % QUADS * 4
        var parts = Array[SIMD[F32, 4], HALVES * SPLIT](fill=0)
        comptime for h in range(HALVES):  # all in flight before the first is used
            comptime for r in range(SPLIT):
                var at = token * (OUTPUTS + PAD) + h * (OUTPUTS // 2) + quad
                comptime if SPLIT > 1:
                    parts[h * SPLIT + r] = _load_peer(part + UInt32(at * 4), r)
                else:
                    parts[h] = own.unsafe_load[width=4, alignment=16](at)
        comptime for h in range(HALVES):
            comptime for r in range(1, SPLIT):
                parts[h * SPLIT] += parts[h * SPLIT + r]
        var sum = parts[0]
        comptime if GATED:
            sum = _silu_mul[BF16, 4](sum.cast[BF16](), parts[SPLIT].cast[BF16]()).cast[F32]()
        var output = output_base + quad
        var yp = y.unsafe_offset((token_base + token) * N + output)
        comptime if has_bias:
            comptime for e in range(4):
                sum[e] += bias[unsafe_offset=min(output + e, N - 1)].cast[F32]()
        if N % 4 == 0:
            if output < N:
                yp.unsafe_store[alignment=8](0, sum.cast[out_dtype]())
        else:
            comptime for e in range(4):
                if output + e < N:
                    yp[unsafe_offset=e] = sum[e].cast[out_dtype]()


@always_inline
def store_partial[
    SWAP: Bool, COLUMNS: Int, OUTPUTS: Int
](
    part: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    acc: TileTensor[mut=True, dtype=F32, address_space=AddressSpace.LOCAL, ...],
    row: Int,
    column: Int,
):
    """Writes a fragment to the partial tile [tokens, OUTPUTS + PAD]."""
    comptime for j in range(COLUMNS // 8):
        comptime for e in range(4):
            comptime if SWAP:
                part[unsafe_offset=(j * 8 + column + e % 2) * (OUTPUTS + PAD) + row + e // 2 * 8] = acc[0, 4 * j + e][0]
            else:
                part[unsafe_offset=(row + e // 2 * 8) * (OUTPUTS + PAD) + j * 8 + column + e % 2] = acc[0, 4 * j + e][0]


@always_inline
def store_swapped[
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
    """Writes a fragment whose rows are outputs and whose columns are tokens."""
    # Two rows of A are two outputs; the columns are tokens, this thread's at constant distances from `column`.
    comptime for half in range(2):
        var output = output_base + row + half * 8
        var yp = y.unsafe_offset((token_base + column) * N + output)
        var left = M - token_base - column if output < N else 0
        var b = Float32(0)
        comptime if has_bias:
            b = bias[unsafe_offset=min(output, N - 1)].cast[F32]()
        comptime for j in range(COLUMNS // 8):
            comptime for e in range(2):
                if j * 8 + e < left:
                    yp[unsafe_offset=(j * 8 + e) * N] = (acc[0, 4 * j + 2 * half + e][0] + b).cast[out_dtype]()


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
