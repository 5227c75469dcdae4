"""Pieces that the GPU kernels of `mili.paged_attention` share."""

from ._prelude import *
from std.sys import inlined_assembly

comptime LOG2E = Float32(1.4426950408889634)
comptime VEC = 8  # bfloat16 elements of 16 bytes


@always_inline
def _exp2(x: Float32) -> Float32:
    return inlined_assembly["ex2.approx.ftz.f32 $0, $1;", Float32, constraints="=f,f", has_side_effect=False](x)


@always_inline
def _quad_max(x: Float32) -> Float32:
    """The maximum over four neighbouring lanes, which hold one row of an mma tile."""
    var y = max(x, warp.shuffle_xor(x, 1))
    return max(y, warp.shuffle_xor(y, 2))


@always_inline
def _quad_sum(x: Float32) -> Float32:
    var y = x + warp.shuffle_xor(x, 1)
    return y + warp.shuffle_xor(y, 2)


@always_inline
def _inverse(sum: Float32) -> Float32:
    """1 / sum, and 0 for a request without keys."""
    return Float32(0) if sum == 0 else 1 / sum


@always_inline
def _push(address: Int32, landed: Int32, rank: Int32, value: SIMD[F32, 4]):
    """Sends 16 bytes to a shared-memory address of block `rank` of the cluster, and word of them to its mbarrier at `landed`."""
    inlined_assembly[
        (
            "{ .reg .b32 ra, rb; mapa.shared::cluster.u32 ra, $0, $2; mapa.shared::cluster.u32 rb, $1, $2;"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [ra], {$3, $4, $5, $6}, [rb]; }"
        ),
        NoneType,
        constraints="r,r,r,f,f,f,f,~{memory}",
        has_side_effect=True,
    ](address, landed, rank, value[0], value[1], value[2], value[3])


@always_inline
def _push_pair(address: Int32, landed: Int32, rank: Int32, first: Float32, second: Float32):
    """Sends 8 bytes."""
    inlined_assembly[
        (
            "{ .reg .b32 ra, rb; mapa.shared::cluster.u32 ra, $0, $2; mapa.shared::cluster.u32 rb, $1, $2;"
            " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [ra], {$3, $4}, [rb]; }"
        ),
        NoneType,
        constraints="r,r,r,f,f,~{memory}",
        has_side_effect=True,
    ](address, landed, rank, first, second)
