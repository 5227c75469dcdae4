"""What a block of `_linear_skinny_gpu` does before it multiplies: x + residual and its RMSNorm, into shared memory.

Every block does it for all rows, up to 8 of up to 1024 values; block 0 writes the new residual. The warps that multiply a slice
of 256 values of k share the rows of that slice among their groups. The bits are those of `add_rms_norm`: it too adds up a
row of this length as sums of 256 neighbours, in their order.
"""

from ._prelude import *
from max.gpu.memory import async_copy, async_copy_wait_all

comptime SLICE = 256  # values of k that a warp multiplies
comptime MAX_SLICES = 4
comptime MAX_NORM_K = MAX_SLICES * SLICE
comptime TOKENS = 8
comptime PITCH = MAX_NORM_K + 32  # of a row in shared memory: neighbouring rows hit other banks


@always_inline
def norm_rows[
    GROUPS: Int
](
    held: MutPointer[Scalar[BF16], _, address_space=AddressSpace.SHARED],
    sums: MutPointer[Float32, _, address_space=AddressSpace.SHARED],
    residual_out: Ptr[BF16],
    x: Ptr[BF16],
    residual: Ptr[BF16],
    gain: SIMD[BF16, 8],
    group: Int,
    slice: Int,
    slices: Int,
    m: Int,
    k: Int,
    eps: Float32,
):
    """`gain` is the lane's part of the slice, `held` [TOKENS, PITCH], `sums` [TOKENS, MAX_SLICES]."""
    var at = slice * SLICE + lane_id() * 8
    # Copies need no registers, which hold w: all rows are under way at once.
    for token in range(group, m, GROUPS):
        async_copy[16](x.address_space_cast[AddressSpace.GLOBAL]().unsafe_offset(token * k + at), held.unsafe_offset(token * PITCH + at))
        async_copy[16](residual.address_space_cast[AddressSpace.GLOBAL]().unsafe_offset(token * k + at), held.unsafe_offset((TOKENS + token) * PITCH + at))
    async_copy_wait_all()
    for token in range(group, m, GROUPS):
        var row = held.unsafe_offset(token * PITCH + at)
        var a = row.unsafe_load[width=8, alignment=16](0).cast[F32]()
        var r = (a + row.unsafe_load[width=8, alignment=16](TOKENS * PITCH).cast[F32]()).cast[BF16]()
        row.unsafe_store[alignment=16](0, r)
        if block_idx.x == 0:
            residual_out.unsafe_store[alignment=16](token * k + at, r)
        var sum = warp.sum((r.cast[F32]() * r.cast[F32]()).reduce_add())
        if lane_id() == 0:
            sums[unsafe_offset=token * MAX_SLICES + slice] = sum
    barrier()
    for token in range(group, m, GROUPS):
        var total = Float32(0)
        comptime for s in range(MAX_SLICES):
            if s < slices:
                total += sums[unsafe_offset=token * MAX_SLICES + s]
        var scale = 1 / sqrt(total / Float32(k) + eps)
        var r = held.unsafe_load[width=8, alignment=16](token * PITCH + at)
        held.unsafe_store[alignment=16](
            token * PITCH + at, (r.cast[F32]() * scale * gain.cast[F32]()).cast[BF16]()
        )
    barrier()
