"""CPU path of `mili.linear`: one register tile over packed panels, the same sums for any number of rows.

A panel holds 32 output rows of the weight. bfloat16 panels are [K/2][32][2]: two neighbours in k sit in one 32-bit lane, so
that one AVX-512 `vdpbf16ps` advances 16 output rows by two k. float32 panels are [K][32]. Lanes run over output rows, so there is
no horizontal sum, and every output element is accumulated over k in ascending order whatever the tile height: a row of y has the
same bits alone, in a batch, or in a chunk of a prompt.
"""

from ._parallel import for_each
from ._prelude import *

comptime HAS_BF16_DOT = CompilationTarget._has_feature["avx512bf16"]()
comptime WIDTH = min(simd_width_of[F32](), PANEL)
comptime VECS = PANEL // WIDTH  # vectors that span one panel
# Tile height: as many accumulators as leave registers for the panel's vectors (32 registers with AVX-512, 16 with AVX2).
comptime MAX_ROWS = 12 if WIDTH >= 16 else 3


# --8<-- [start:dot2]
@always_inline
def _dot2_bf16(acc: SIMD[F32, 16], w: SIMD[BF16, 32], x: SIMD[BF16, 32]) -> SIMD[F32, 16]:
    """Adds w[2i] x[2i] + w[2i+1] x[2i+1] to lane i."""
    return llvm_intrinsic["llvm.x86.avx512bf16.dpbf16ps.512", SIMD[F32, 16], has_side_effect=False](acc, w, x)
# --8<-- [end:dot2]


@always_inline
def _step[dtype: DType, ROWS: Int](
    mut acc: Array[SIMD[F32, WIDTH], ROWS * VECS], x: Ptr[dtype], panel: Ptr[dtype], k: Int, step: Int
):
    """Advances the tile by one step of k: two values for bfloat16, one for float32."""
    comptime if dtype == BF16:
        var words = x.unsafe_bitcast[Int32]()
        comptime if HAS_BF16_DOT and WIDTH == 16:
            # --8<-- [start:step]
            var w = Array[SIMD[BF16, 32], VECS](fill=0)
            comptime for v in range(VECS):
                w[v] = rebind[Ptr[BF16]](panel).unsafe_load[width=32](step * PANEL * 2 + v * 32)
            comptime for r in range(ROWS):
                var pair = bitcast[BF16, 32](SIMD[DType.int32, 16](words[unsafe_offset=r * (k // 2) + step]))
                comptime for v in range(VECS):
                    acc[r * VECS + v] = rebind[SIMD[F32, WIDTH]](
                        _dot2_bf16(rebind[SIMD[F32, 16]](acc[r * VECS + v]), w[v], pair)
                    )
            # --8<-- [end:step]
        else:
            var packed = panel.unsafe_bitcast[Int32]()
            comptime for v in range(VECS):
                var w = packed.unsafe_load[width=WIDTH](step * PANEL + v * WIDTH)
                var even = bitcast[F32, WIDTH](w << 16)
                var odd = bitcast[F32, WIDTH](w & 0xFFFF0000)
                comptime for r in range(ROWS):
                    var at = r * k + 2 * step
                    var a = acc[r * VECS + v]
                    a = even.fma(SIMD[F32, WIDTH](x[unsafe_offset=at].cast[F32]()), a)
                    acc[r * VECS + v] = odd.fma(SIMD[F32, WIDTH](x[unsafe_offset=at + 1].cast[F32]()), a)
    else:
        comptime for v in range(VECS):
            var w = panel.unsafe_load[width=WIDTH](step * PANEL + v * WIDTH).cast[F32]()
            comptime for r in range(ROWS):
                var b = SIMD[F32, WIDTH](x[unsafe_offset=r * k + step].cast[F32]())
                acc[r * VECS + v] = w.fma(b, acc[r * VECS + v])


@always_inline
def _tiles[dtype: DType, out_dtype: DType, ROWS: Int, has_bias: Bool](
    y: Ptr[out_dtype], stride: Int, x: Ptr[dtype], panel: Ptr[dtype], bias: Ptr[F32], row: Int, m: Int, k: Int
) -> Int:
    """Computes rows [row, m) of one panel's 32 columns in tiles of ROWS while they fit; returns the first row left."""
    var first = row
    while first + ROWS <= m:
        var acc = Array[SIMD[F32, WIDTH], ROWS * VECS](fill=0)
        for step in range(k // 2 if dtype == BF16 else k):
            _step[dtype, ROWS](acc, x.unsafe_offset(first * k), panel, k, step)
        comptime for r in range(ROWS):
            comptime for v in range(VECS):
                var value = acc[r * VECS + v]
                comptime if has_bias:
                    value += bias.unsafe_load[width=WIDTH](v * WIDTH)
                y.unsafe_store((first + r) * stride + v * WIDTH, value.cast[out_dtype]())
        first += ROWS
    return first


def _panel[dtype: DType, out_dtype: DType, has_bias: Bool](
    y: Ptr[out_dtype], stride: Int, x: Ptr[dtype], panel: Ptr[dtype], bias: Ptr[F32], m: Int, k: Int
):
    """Computes one panel's 32 columns for all rows: full tiles, then halves for what is left (few heights, little code)."""
    var row = _tiles[dtype, out_dtype, MAX_ROWS, has_bias](y, stride, x, panel, bias, 0, m, k)
    comptime for halving in range(4):
        comptime ROWS = 8 >> halving
        comptime if ROWS < MAX_ROWS:
            row = _tiles[dtype, out_dtype, ROWS, has_bias](y, stride, x, panel, bias, row, m, k)


def linear_cpu[dtype: DType, out_dtype: DType, has_bias: Bool](
    y: Ptr[out_dtype], x: Ptr[dtype], w: Ptr[dtype], bias: Ptr[dtype], m: Int, n: Int, k: Int
):
    """Computes y[m, n] = x[m, k] w^T (+ bias) with w in panels, parallel over runs of panels."""
    # --8<-- [start:tasks]
    var panels = ceildiv(n, PANEL)

    def task(p: Int) {var}:
        var panel = w.unsafe_offset(p * PANEL * k)
        var columns = min(PANEL, n - p * PANEL)
        var bias32 = Array[Float32, PANEL](fill=0)
        var bp = rebind[Ptr[F32]](bias32.unsafe_ptr())
        comptime if has_bias:
            for i in range(columns):
                bp[unsafe_offset=i] = bias[unsafe_offset=p * PANEL + i].cast[F32]()
        if columns == PANEL:
            _panel[dtype, out_dtype, has_bias](y.unsafe_offset(p * PANEL), n, x, panel, bp, m, k)
            return
        # The last panel may be wider than what is left of y: compute whole rows aside, then copy.
        var whole = List[Scalar[out_dtype]](unsafe_uninit_length=m * PANEL)
        var rows = rebind[Ptr[out_dtype]](whole.unsafe_ptr())
        _panel[dtype, out_dtype, has_bias](rows, PANEL, x, panel, bp, m, k)
        for r in range(m):
            for i in range(columns):
                y[unsafe_offset=r * n + p * PANEL + i] = rows[unsafe_offset=r * PANEL + i]
        _ = whole^

    # A chunk of panels is one contiguous stretch of the weight, read once however many rows there are.
    for_each(task, panels, n * k * size_of[dtype]() * ceildiv(m, 4))
    # --8<-- [end:tasks]
