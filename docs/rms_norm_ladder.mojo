"""Residual add and RMSNorm from naive to fast on the CPU: each level is checked against the first, then timed.

    mojo run -I . docs/rms_norm_ladder.mojo      (from the top of the source tree)

Prints one line per level: milliseconds for a prefill chunk of one Qwen3-0.6B layer, and the GB/s that this is if every
level moved only the bytes that the operation must move (4 T H sizeof(dtype)). The 4 MB stay in the caches, as they do between
the kernels of a step, so this can be more than main memory delivers.
"""

from mojo_kernels._parallel import for_each
from mojo_kernels._prelude import *
from mojo_kernels._rms_norm_cpu import _add_norm_row_cpu
from std.memory.alloc import unsafe_alloc
from std.time import perf_counter_ns

comptime T = 512
comptime H = 1024
comptime EPS = Float32(1e-6)
comptime P = Ptr[BF16]


# --8<-- [start:naive]
def naive(y: P, r: P, x: P, residual: P, weight: P):
    """Level 1: the equation, one pass per sign in it."""
    for i in range(T * H):  # the residual add, an op of its own
        r[unsafe_offset=i] = (x[unsafe_offset=i].cast[F32]() + residual[unsafe_offset=i].cast[F32]()).cast[BF16]()
    for t in range(T):
        var squares = Float32(0)
        for i in range(H):
            var value = r[unsafe_offset=t * H + i].cast[F32]()
            squares += value * value
        var scale = 1 / sqrt(squares / H + EPS)
        for i in range(H):
            var value = r[unsafe_offset=t * H + i].cast[F32]()
            y[unsafe_offset=t * H + i] = (value * scale * weight[unsafe_offset=i].cast[F32]()).cast[BF16]()
# --8<-- [end:naive]


# --8<-- [start:fused]
def fused(y: P, r: P, x: P, residual: P, weight: P):
    """Level 2: the add happens while the squares are summed; a row is still in the cache when it is scaled."""
    for t in range(T):
        var squares = Float32(0)
        for i in range(t * H, (t + 1) * H):
            var sum = (x[unsafe_offset=i].cast[F32]() + residual[unsafe_offset=i].cast[F32]()).cast[BF16]()
            r[unsafe_offset=i] = sum
            squares += sum.cast[F32]() * sum.cast[F32]()
        var scale = 1 / sqrt(squares / H + EPS)
        for i in range(H):
            var value = r[unsafe_offset=t * H + i].cast[F32]()
            y[unsafe_offset=t * H + i] = (value * scale * weight[unsafe_offset=i].cast[F32]()).cast[BF16]()
# --8<-- [end:fused]


# --8<-- [start:levels]
def vectorised(y: P, r: P, x: P, residual: P, weight: P):
    """Level 3: mili's row, a vector register of numbers at a time, row after row."""
    for t in range(T):
        var at = t * H
        _add_norm_row_cpu[BF16](
            y.unsafe_offset(at), r.unsafe_offset(at), x.unsafe_offset(at), residual.unsafe_offset(at), weight, H, EPS
        )


def parallel(y: P, r: P, x: P, residual: P, weight: P):
    """Level 4: the same rows, on all cores."""

    def row(t: Int) {var}:
        var at = t * H
        _add_norm_row_cpu[BF16](
            y.unsafe_offset(at), r.unsafe_offset(at), x.unsafe_offset(at), residual.unsafe_offset(at), weight, H, EPS
        )

    for_each(row, T, 4 * T * H * size_of[BF16]())
# --8<-- [end:levels]


def array(count: Int, seed: Int) -> P:
    """Numbers between -1 and 1 from a linear congruential generator."""
    var result = rebind[P](unsafe_alloc[Scalar[BF16]](count, alignment=64))
    var state = UInt32(seed)
    for i in range(count):
        state = state * 1664525 + 1013904223
        result[unsafe_offset=i] = (Float32(state >> 8) / Float32(1 << 23) - 1).cast[BF16]()
    return result


def check(level: StringLiteral, y: P, r: P, expected_y: P, expected_r: P) raises:
    """The sums must be equal; the norms may differ by the order in which squares were added: one unit in the last place."""
    for i in range(T * H):
        var want = expected_y[unsafe_offset=i].cast[F32]()
        var error = abs(y[unsafe_offset=i].cast[F32]() - want)
        if r[unsafe_offset=i] != expected_r[unsafe_offset=i] or not (error <= abs(want) / 128):
            raise Error(level, " is wrong at row ", i // H, ", column ", i % H)


def measure[level: def(P, P, P, P, P) thin -> None](
    name: StringLiteral, x: P, residual: P, weight: P, expected_y: P, expected_r: P
) raises:
    var y = array(T * H, 7)
    var r = array(T * H, 8)
    level(y, r, x, residual, weight)
    check(name, y, r, expected_y, expected_r)
    var best = Float64.MAX
    for _ in range(30):
        var start = perf_counter_ns()
        level(y, r, x, residual, weight)
        best = min(best, Float64(perf_counter_ns() - start))
    var bytes = Float64(4 * T * H * size_of[BF16]())
    print(name, best / 1e6, "ms", bytes / best, "GB/s")


def main() raises:
    """Checks and times all levels."""
    var x = array(T * H, 1)
    var residual = array(T * H, 2)
    var weight = array(H, 3)
    var y = array(T * H, 4)
    var r = array(T * H, 5)
    naive(y, r, x, residual, weight)
    measure[naive]("1 naive     ", x, residual, weight, y, r)
    measure[fused]("2 fused     ", x, residual, weight, y, r)
    measure[vectorised]("3 vectorised", x, residual, weight, y, r)
    measure[parallel]("4 parallel  ", x, residual, weight, y, r)
