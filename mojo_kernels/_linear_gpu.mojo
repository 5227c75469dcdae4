"""GPU path of `mili.linear`: chooses by shape among five kernels.

Up to 4 rows and a large weight: `_linear_stream_gpu` streams it through shared memory.
Up to 8 rows (16 of the smallest) and a small weight: `_linear_skinny_gpu` holds it in registers as tensor-core fragments.
Other bfloat16 whose tiles, with few rows, all find a multiprocessor: `_linear_few_gpu`, TMA and wgmma with all of w ahead.
The rest in bfloat16: TMA and wgmma, `_linear_wgmma_gpu`. Of its tiles the one whose waves take least, by measured costs, is chosen.
float32, and K no multiple of 8 (the copy engine wants 16-byte rows): the tiled kernel below, for correctness only.
`gated_linear_gpu` knows all but the first.

Every kernel adds in a fixed order, so results repeat bit for bit. Which kernel runs depends on M, so a row may differ
in its last bit between batches of different size; up to 4 rows it does not. `INVARIANT` takes this away: wgmma for any
number of rows, and k never split, so that a sum takes 16 products at a time in the order of k, whatever the tile.

All but the last fetch w before the kernel ahead has finished (programmatic dependent launch), so a kernel launched just
ahead must not write w. Nothing waits on the host: a device graph may capture it.
"""

from ._linear_few_gpu import fits_few, linear_few
from ._linear_skinny_gpu import fits_skinny, fits_skinny_gated, linear_skinny, linear_skinny_gated
from ._linear_stream_gpu import fits_held, fits_stream, linear_stream
from ._linear_stream_kernel_gpu import COPY, DIRECT
from ._linear_wgmma_gpu import MAX_STAGES, linear_wgmma
from ._linear_wgmma_store_gpu import PAD
from ._prelude import *
from .silu_mul import _silu_mul

comptime RING_BYTES = 220_000  # shared memory of a multiprocessor that the rings of its blocks may take


def _simt_kernel[
    dtype: DType, out_dtype: DType, has_bias: Bool, GATED: Bool
](y: Ptr[out_dtype], x: Ptr[dtype], w: Ptr[dtype], bias: Ptr[dtype], m32: Int32, n32: Int32, k32: Int32):
    """64x64 tiles, 256 threads with 4x4 sums each, 16 values of k staged in shared memory at a time.

    A gated tile holds 32 gates and their 32 up projections.
    """
    comptime T = 64
    comptime OUTPUTS = T // 2 if GATED else T
    comptime KT = 16
    var xs = unsafe_stack_allocation[KT * (T + 1), Float32, address_space=AddressSpace.SHARED]()
    var ws = unsafe_stack_allocation[KT * (T + 1), Float32, address_space=AddressSpace.SHARED]()
    var M = Int(m32)
    var N = Int(n32)
    var K = Int(k32)
    var n0 = block_idx.x * OUTPUTS
    var m0 = block_idx.y * T
    var tx = thread_idx.x % 16
    var ty = thread_idx.x // 16
    var acc = Array[SIMD[F32, 4], 4](fill=0)
    for k0 in range(0, K, KT):
        comptime for r in range(4):
            var i = thread_idx.x + r * 256
            var row = i // KT
            var kk = i % KT
            var inside = k0 + kk < K
            xs[unsafe_offset=kk * (T + 1) + row] = (
                x[unsafe_offset=(m0 + row) * K + k0 + kk].cast[F32]() if inside and m0 + row < M else 0
            )
            var output = n0 + row % OUTPUTS
            var w_row = output + row // OUTPUTS * N
            ws[unsafe_offset=kk * (T + 1) + row] = (
                w[unsafe_offset=w_row * K + k0 + kk].cast[F32]() if inside and output < N else 0
            )
        barrier()
        comptime for kk in range(KT):
            var b = SIMD[F32, 4](0)
            comptime for j in range(4):
                b[j] = ws[unsafe_offset=kk * (T + 1) + tx + j * 16]
            comptime for i in range(4):
                acc[i] = b.fma(SIMD[F32, 4](xs[unsafe_offset=kk * (T + 1) + ty + i * 16]), acc[i])
        barrier()
    comptime for i in range(4):
        comptime for j in range(OUTPUTS // 16):
            var token = m0 + ty + i * 16
            var output = n0 + tx + j * 16
            if token < M and output < N:
                var value = acc[i][j]
                comptime if GATED:
                    value = _silu_mul[dtype, 1](value.cast[dtype](), acc[i][2 + j].cast[dtype]()).cast[F32]()
                comptime if has_bias:
                    value += bias[unsafe_offset=output].cast[F32]()
                y[unsafe_offset=token * N + output] = value.cast[out_dtype]()


def _linear_simt[
    dtype: DType, out_dtype: DType, has_bias: Bool, GATED: Bool
](y: Ptr[out_dtype], x: Ptr[dtype], w: Ptr[dtype], bias: Ptr[dtype], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    comptime kernel = _simt_kernel[dtype, out_dtype, has_bias, GATED]
    var columns = ceildiv(n, 32 if GATED else 64)
    ctx.enqueue_function[kernel](
        y, x, w, bias, Int32(m), Int32(n), Int32(k), grid_dim=(columns, ceildiv(m, 64)), block_dim=256
    )


@always_inline
def _few_tokens[
    out_dtype: DType, has_bias: Bool, GATED: Bool, COLUMNS: Int
](y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Tiles of 64 rows of w by COLUMNS tokens, of any shape."""
    comptime SMS = ctx.default_device_info.sm_count
    comptime STAGE = (64 + COLUMNS) * 128
    comptime TILE = COLUMNS * (64 + PAD) * 4
    var tiles = ceildiv(n, 32 if GATED else 64) * ceildiv(m, COLUMNS)
    if tiles > 3 * SMS:
        # Two blocks a multiprocessor walk over the tiles: the ring fills for the next while one is stored.
        var stages = min((RING_BYTES // 2 - TILE) // STAGE, MAX_STAGES)
        linear_wgmma[out_dtype, has_bias, GATED, True, 1, COLUMNS](y, x, w, bias, m, n, k, stages, 2 * SMS, ctx)
        return
    # One block a multiprocessor gets a ring as deep as fits; otherwise up to three share its memory.
    var blocks = min(ceildiv(tiles, SMS), 3)
    var stages = min(max(RING_BYTES // blocks // STAGE, 4), MAX_STAGES, ceildiv(k, 64))
    linear_wgmma[out_dtype, has_bias, GATED, True, 1, COLUMNS](y, x, w, bias, m, n, k, stages, tiles, ctx)


@always_inline
def _parts[COLUMNS: Int, GATED: Bool, INVARIANT: Bool](tiles: Int, k: Int, sms: Int) -> Int:
    """Blocks that share the k of a tile: about 64 in all where a product is short, one a multiprocessor where k is long."""
    comptime if INVARIANT:
        return 1
    elif GATED:
        # Of tiles this narrow two blocks fit on a multiprocessor.
        return 2 if COLUMNS == 16 and k >= 1024 else 1
    else:
        var most = sms if k >= 4096 else sms // 2
        var parts = 1
        while parts < (2 if COLUMNS == 128 else 4) and 2 * parts * tiles <= most and k >= 512 * parts:
            parts *= 2
        return parts


@always_inline
def _few[
    has_bias: Bool, GATED: Bool, INVARIANT: Bool, COLUMNS: Int
](y: Ptr[BF16], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Tiles of 64 rows of w by COLUMNS tokens, k in as many parts as pay."""
    comptime CHUNKS = 4 if COLUMNS <= 32 else 2
    comptime SMS = ctx.default_device_info.sm_count
    var parts = _parts[COLUMNS, GATED, INVARIANT](ceildiv(n, 32 if GATED else 64) * ceildiv(m, COLUMNS), k, SMS)
    comptime MOST = 1 if INVARIANT else 4 if not GATED else 2 if COLUMNS == 16 else 1
    comptime for log in range(1, 3):
        comptime PARTS = 1 << log
        comptime if PARTS <= MOST:
            if parts == PARTS:
                linear_few[has_bias, GATED, 1, COLUMNS, PARTS, CHUNKS](y, x, w, bias, m, n, k, ctx)
                return
    linear_few[has_bias, GATED, 1, COLUMNS, 1, CHUNKS](y, x, w, bias, m, n, k, ctx)


@always_inline
def _many_tokens[
    out_dtype: DType, has_bias: Bool, GATED: Bool, COLUMNS: Int
](
    y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, stages: Int, ctx: DeviceContext
) raises:
    """Tiles of 128 tokens by COLUMNS rows of w; with a long k, pairs of blocks load w together."""
    comptime SMS = ctx.default_device_info.sm_count
    # Less traffic leaves the tensor cores more of the power limit: 2 to 8% at 16384 tokens of 8B, nothing where k is short.
    if m > 128 and k >= 4096:
        linear_wgmma[out_dtype, has_bias, GATED, False, 2, COLUMNS, 2](y, x, w, bias, m, n, k, stages, SMS, ctx)
    else:
        linear_wgmma[out_dtype, has_bias, GATED, False, 2, COLUMNS](y, x, w, bias, m, n, k, stages, SMS, ctx)


def _linear_tiles[
    out_dtype: DType, has_bias: Bool, GATED: Bool, INVARIANT: Bool
](y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Chooses tile and split of the wgmma kernels; n counts the columns of y."""
    comptime SMS = ctx.default_device_info.sm_count
    comptime NARROW = out_dtype == BF16
    var w_rows = 2 * n if GATED else n
    var k_tiles = ceildiv(k, 64)
    var few = NARROW and fits_few(n, k)
    # Tiles of 64 tokens have 64 rows of w, or 128 if there would be too many.
    var groups = 1
    while groups < 4 and ceildiv(w_rows, 64 * groups) * ceildiv(m, 64) > SMS:
        groups *= 2
    if m <= 64:
        comptime if NARROW:
            var yb = rebind[Ptr[BF16]](y)
            if few and (groups == 1 or (groups == 2 and m > 32)):
                if m <= 16:
                    _few[has_bias, GATED, INVARIANT, 16](yb, x, w, bias, m, n, k, ctx)
                elif m <= 32:
                    _few[has_bias, GATED, INVARIANT, 32](yb, x, w, bias, m, n, k, ctx)
                elif groups == 1:
                    _few[has_bias, GATED, INVARIANT, 64](yb, x, w, bias, m, n, k, ctx)
                else:
                    linear_few[has_bias, GATED, 2, 64, 1, 2](yb, x, w, bias, m, n, k, ctx)
                return
        if m <= 32:
            _few_tokens[out_dtype, has_bias, GATED, 32](y, x, w, bias, m, n, k, ctx)
        else:
            _few_tokens[out_dtype, has_bias, GATED, 64](y, x, w, bias, m, n, k, ctx)
    else:

        # --8<-- [start:choice]
        @always_inline
        def nanoseconds[COLUMNS: Int](step: Int, tile: Int) {imm} -> Int:
            """Estimates waves of tiles of 128 tokens by COLUMNS rows of w: a step of 64 in k, and what a tile costs besides."""
            return ceildiv(ceildiv(m, 128) * ceildiv(w_rows, COLUMNS), SMS) * (k_tiles * step + tile)

        var by_128 = nanoseconds[128](372, 1400)
        var by_192 = nanoseconds[192](545, 1400)
        # Other warps finish a gated tile of 256 meanwhile, but nothing covers a block's last.
        var by_256 = nanoseconds[256](690, 700) + 2000 if GATED else nanoseconds[256](690, 2800)
        # Half of k each for the two blocks of a cluster, where that keeps more multiprocessors busy.
        var tiles = ceildiv(m, 128) * ceildiv(w_rows, 128)
        var split = 2 if few and not (GATED or INVARIANT) and 2 * tiles <= SMS and k_tiles >= 32 else 1
        if split == 2:
            by_128 = k_tiles // 2 * 372 + 5400
        var best = min(by_128, min(by_192, by_256))
        # --8<-- [end:choice]
        # 64 rows of w by 128 tokens; k in one part or two.
        var small = ceildiv(w_rows, 64) * ceildiv(m, 128)
        var parts = _parts[128, GATED, INVARIANT](small, 4096, SMS) if few and k_tiles >= 32 else 1
        var by_small = k_tiles // parts * 270 + 1200 * parts - 150 if small <= SMS else best
        comptime if NARROW:
            var yb = rebind[Ptr[BF16]](y)
            var parts_64 = _parts[64, GATED, INVARIANT](ceildiv(w_rows, 64) * ceildiv(m, 64), k, SMS) if groups == 1 else 1
            var by_64 = k_tiles // parts_64 * (64 * groups + 64) * 11 // 8 + (1050 if parts_64 == 1 else 2250)
            if few and groups <= 2 and m <= 128 and by_64 < min(best, by_small):
                if groups == 1:
                    _few[has_bias, GATED, INVARIANT, 64](yb, x, w, bias, m, n, k, ctx)
                else:
                    linear_few[has_bias, GATED, 2, 64, 1, 2](yb, x, w, bias, m, n, k, ctx)
                return
            if few and by_small < best:
                comptime if not (GATED or INVARIANT):
                    if parts == 2:
                        linear_few[has_bias, GATED, 1, 128, 2, 2](yb, x, w, bias, m, n, k, ctx)
                        return
                linear_few[has_bias, GATED, 1, 128, 1, 2](yb, x, w, bias, m, n, k, ctx)
                return
            comptime if not (GATED or INVARIANT):
                if split == 2 and best == by_128:
                    linear_few[has_bias, GATED, 2, 128, 2, 1](yb, x, w, bias, m, n, k, ctx)
                    return
        if by_small < best:
            _few_tokens[out_dtype, has_bias, GATED, 128](y, x, w, bias, m, n, k, ctx)
        elif best == by_128:
            linear_wgmma[out_dtype, has_bias, GATED, False, 2, 128](y, x, w, bias, m, n, k, 6, SMS, ctx)
        elif best == by_192:
            _many_tokens[out_dtype, has_bias, GATED, 192](y, x, w, bias, m, n, k, 5, ctx)
        else:
            _many_tokens[out_dtype, has_bias, GATED, 256](y, x, w, bias, m, n, k, 3 if GATED else 4, ctx)


def _linear_bf16[
    out_dtype: DType, has_bias: Bool, INVARIANT: Bool
](y: Ptr[out_dtype], x: Ptr[BF16], w: Ptr[BF16], bias: Ptr[BF16], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Chooses kernel, tile and split; the thresholds are measurements on an H200 (N, K of Qwen3 0.6B and 8B)."""
    comptime if not INVARIANT:
        if fits_stream(m, n, k):
            if fits_held(m, k):
                linear_stream[out_dtype, has_bias, COPY, False](y, x, x, x, x, w, bias, m, n, k, 0, ctx)
            else:
                linear_stream[out_dtype, has_bias, DIRECT, False](y, x, x, x, x, w, bias, m, n, k, 0, ctx)
            return
        if fits_skinny(m, n, k):
            linear_skinny[out_dtype, has_bias](y, x, w, bias, m, n, k, w, 0, w, 0, ctx)
            return
    _linear_tiles[out_dtype, has_bias, False, INVARIANT](y, x, w, bias, m, n, k, ctx)


def linear_gpu[
    dtype: DType, out_dtype: DType, has_bias: Bool, INVARIANT: Bool
](y: Ptr[out_dtype], x: Ptr[dtype], w: Ptr[dtype], bias: Ptr[dtype], m: Int, n: Int, k: Int, ctx: DeviceContext) raises:
    """Enqueues y[m, n] = x[m, k] w[n, k]^T (+ bias[n]); x and w are 16-byte aligned, bias unread without has_bias."""
    if m == 0 or n == 0:
        return
    comptime if dtype == BF16:
        if k % 8 == 0:
            comptime P = Ptr[BF16]
            _linear_bf16[out_dtype, has_bias, INVARIANT](y, rebind[P](x), rebind[P](w), rebind[P](bias), m, n, k, ctx)
            return
    _linear_simt[dtype, out_dtype, has_bias, False](y, x, w, bias, m, n, k, ctx)


def gated_linear_gpu[
    dtype: DType, INVARIANT: Bool
](y: Ptr[dtype], x: Ptr[dtype], w: Ptr[dtype], m: Int, i: Int, k: Int, ctx: DeviceContext) raises:
    """Enqueues y[m, i] = silu(x[m, k] wg[i, k]^T) * (x wu[i, k]^T), w = [wg; wu]; x and w are 16-byte aligned.

    Gate and up are rounded to dtype before the product, as if stored between.
    """
    if m == 0 or i == 0:
        return
    comptime if dtype == BF16:
        if k % 8 == 0:
            comptime P = Ptr[BF16]
            var wp = rebind[P](w)
            comptime if not INVARIANT:
                if fits_skinny_gated(m, i, k):
                    linear_skinny_gated(rebind[P](y), rebind[P](x), wp, m, i, k, ctx)
                    return
            _linear_tiles[BF16, False, True, INVARIANT](rebind[P](y), rebind[P](x), wp, wp, m, i, k, ctx)
            return
    _linear_simt[dtype, dtype, False, True](y, x, w, w, m, i, k, ctx)
