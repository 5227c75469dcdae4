"""The MLP's activation: SiLU of the gate times the up projection.

Math:      y[t, i] = g / (1 + exp(-g)) * u,  g = gate_up[t, i], u = gate_up[t, I + i]
Shapes:    y [T, I], gate_up [T, 2I]
Dtypes:    bfloat16 or float32; float32 arithmetic, one rounding at the store
CPU:       parallel over rows, SIMD over i with a scalar tail
GPU:       one thread per 16 bytes of y, one thread block per 256 threads of a row
Bound:     bytes = 3 T I sizeof(dtype); flops = 5 T I
Limits:    none
Source:    SwiGLU, Shazeer 2020 (arXiv 2002.05202)
"""

from ._parallel import for_each
from ._prelude import *


@always_inline
def _silu_mul_f32[W: Int](gate: SIMD[F32, W], up: SIMD[F32, W]) -> SIMD[F32, W]:
    """For an NVIDIA GPU, and a result that is rounded to bfloat16."""
    # An exact division is a dozen instructions, and one ulp of float32 is far below the rounding that follows. An
    # exponential below the smallest normal number may be 0, as 1 is added to it.
    var silu = SIMD[F32, W](0)
    comptime for i in range(W):
        var e = llvm_intrinsic["llvm.nvvm.ex2.approx.ftz.f", Float32](gate[i] * Float32(-1.4426950408889634))
        silu[i] = gate[i] * llvm_intrinsic["llvm.nvvm.rcp.approx.ftz.f", Float32](1 + e)
    return silu * up


@always_inline
def _silu_mul[dtype: DType, W: Int](gate: SIMD[dtype, W], up: SIMD[dtype, W]) -> SIMD[dtype, W]:
    var g = gate.cast[F32]()
    var u = up.cast[F32]()
    comptime if is_nvidia_gpu() and dtype == BF16:
        return _silu_mul_f32[W](g, u).cast[dtype]()
    else:
        return (g / (1 + exp(-g)) * u).cast[dtype]()


def _silu_mul_cpu[dtype: DType](y: Ptr[dtype], gate_up: Ptr[dtype], tokens: Int, n: Int):
    comptime W = simd_width_of[F32]()

    def row(t: Int) {var}:
        var gate = gate_up.unsafe_offset(t * 2 * n)
        var up = gate.unsafe_offset(n)
        var out = y.unsafe_offset(t * n)
        var i = 0
        while i + W <= n:
            out.unsafe_store(i, _silu_mul[dtype, W](gate.unsafe_load[width=W](i), up.unsafe_load[width=W](i)))
            i += W
        while i < n:
            out[unsafe_offset=i] = _silu_mul[dtype, 1](gate[unsafe_offset=i], up[unsafe_offset=i])
            i += 1

    for_each(row, tokens, 6 * tokens * n * size_of[dtype]())


def _silu_mul_kernel[dtype: DType, VEC: Int](y: Ptr[dtype], gate_up: Ptr[dtype], n32: Int32):
    comptime ALIGN = VEC * size_of[dtype]()
    var n = Int(n32)
    var i = (block_idx.x * 256 + thread_idx.x) * VEC
    launch_dependent_grids()
    wait_on_dependent_grids()
    if i < n:
        var gate = gate_up.unsafe_offset(block_idx.y * 2 * n)
        var g = gate.unsafe_load[width=VEC, alignment=ALIGN](i)
        var u = gate.unsafe_load[width=VEC, alignment=ALIGN](n + i)
        y.unsafe_store[alignment=ALIGN](block_idx.y * n + i, _silu_mul[dtype, VEC](g, u))


def _silu_mul_gpu[dtype: DType](y: Ptr[dtype], gate_up: Ptr[dtype], tokens: Int, n: Int, ctx: DeviceContext) raises:
    @always_inline
    def launch[VEC: Int]() raises {imm}:
        comptime kernel = _silu_mul_kernel[dtype, VEC]
        ctx.enqueue_function[kernel](
            y,
            gate_up,
            Int32(n),
            grid_dim=(ceildiv(n, 256 * VEC), tokens),
            block_dim=256,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )

    comptime VEC = 16 // size_of[dtype]()
    if n % VEC == 0:
        launch[VEC]()
    else:
        launch[1]()


@always_inline
def _silu_mul_rows[
    target: StaticString, dtype: DType
](y: Ptr[dtype], gate_up: Ptr[dtype], tokens: Int, n: Int, ctx: DeviceContext) raises:
    """Makes y [tokens, n] of gate_up [tokens, 2n]; the fused op calls it too."""
    if tokens == 0:
        return
    comptime if is_cpu[target]():
        _silu_mul_cpu[dtype](y, gate_up, tokens, n)
    elif is_gpu[target]():
        _silu_mul_gpu[dtype](y, gate_up, tokens, n, ctx)
    else:
        comptime assert False, "mili.silu_mul: unsupported target"


@extensibility.register("mili.silu_mul")
struct SiluMul:
    """Applies SiLU to the gate half and multiplies by the up half."""

    @staticmethod
    def execute[
        target: StaticString
    ](y: OutputTensor[rank=2, ...], gate_up: InputTensor[dtype=y.dtype, rank=2, ...], ctx: DeviceContext) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".

        Args:
            y: Output [T, I].
            gate_up: Input [T, 2I], gate first.
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        _silu_mul_rows[target](y.unsafe_ptr(), gate_up.unsafe_ptr(), y.dim_size(0), y.dim_size(1), ctx)
