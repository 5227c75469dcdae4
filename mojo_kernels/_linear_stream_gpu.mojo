"""Few rows (up to 4) times a large weight, which is streamed through shared memory: when, and the launch.

Math:      y = x w^T (+ bias), or y = silu(x wg^T) * (x wu^T) with w = [wg; wu] (GATED)
Input:     x from memory (DIRECT), or held in shared memory as it is (COPY) or as `add_rms_norm` makes it of
           (x, residual) (NORM), which every block then computes again for itself
When:      `fits_stream`. The product costs what reading w costs, and the kernel (`_linear_stream_kernel_gpu`) keeps more of it
           under way than registers hold. Measured on an H200, 8B at one row: 4.5 TB/s for the LM head, 92 us a layer, where
           warps that load w into registers (`_linear_skinny_gpu`) take 124; from 5 rows on `_linear_wgmma_gpu` is faster.
"""

from ._linear_stream_kernel_gpu import (
    BOX_K,
    BOX_ROWS,
    DIRECT,
    KC,
    MAX_STAGES,
    MAX_TOKENS,
    PART,
    STAGE,
    THREADS,
    WARPS,
    _stream_kernel,
    _Tma,
)
from ._prelude import *
from layout import TileTensor, row_major
from layout.coord import Coord, coord
from layout.tma_async import create_tensor_tile
from max.gpu.host import FuncAttribute

comptime RING_BYTES = 226_000  # shared memory that a block's ring, sums and rows of x may take


def fits_stream(m: Int, n: Int, k: Int) -> Bool:
    """Whether `linear_stream` is the fastest for m rows and a w of n; smaller weights fit into registers as a whole."""
    return m <= MAX_TOKENS and k % 8 == 0 and n * k >= 8_000_000


def fits_held(m: Int, k: Int) -> Bool:
    """Whether x is little enough that every block may hold it, and norm it for itself."""
    return k <= 8192 and m * k <= 16384


def linear_stream[
    out_dtype: DType, has_bias: Bool, INPUT: Int, GATED: Bool
](
    y: Ptr[out_dtype],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: Ptr[BF16],
    w: Ptr[BF16],
    bias: Ptr[BF16],
    m: Int,
    n: Int,
    k: Int,
    eps: Float32,
    ctx: DeviceContext,
) raises:
    """One launch; y is [m, n], and w has n rows or, gated, 2n. Only NORM reads and writes the residuals.

    `residual_out` must not be `residual`, which every block reads.
    """
    comptime SMS = ctx.default_device_info.sm_count
    comptime OUTPUTS = 8 if GATED else 16
    var blocks = min(SMS, ceildiv(n, 8))
    var fixed = WARPS * m * PART * 4 + (m * (k + 32) * 2 if INPUT != DIRECT else 0)
    var work = ceildiv(ceildiv(ceildiv(n, 8), blocks) * 8, OUTPUTS) * ceildiv(k, KC)  # stages a block reads in all
    var stages = min((RING_BYTES - fixed) // (STAGE * 2), work, MAX_STAGES)
    var smem = stages * STAGE * 2 + fixed
    comptime kernel = _stream_kernel[out_dtype, has_bias, INPUT, GATED]
    var rows = 2 * n if GATED else n
    var w_tma: _Tma = create_tensor_tile[coord[BOX_ROWS, BOX_K], __desc_shape=coord[BOX_ROWS, BOX_K]](
        ctx, TileTensor(w, row_major(Coord(rows, k)))
    )
    ctx.enqueue_function[kernel](
        w_tma,
        y,
        residual_out,
        x,
        residual,
        gain,
        bias,
        Int32(m),
        Int32(n),
        Int32(k),
        Int32(stages),
        eps,
        grid_dim=blocks,
        block_dim=THREADS + WARP_SIZE,
        shared_mem_bytes=smem,
        func_attribute=FuncAttribute.MAX_DYNAMIC_SHARED_SIZE_BYTES(UInt32(smem)),
        attributes=pdl_launch_attributes(PDLLevel.ON),
    )
