"""Token embedding: one row of the embedding matrix for each token id.

Math:      hidden[t, :] = table[token_ids[t], :];  zeros[t, :] = 0
Shapes:    hidden [T, H], zeros [T, H], token_ids [T] int32,
           table: CPU [ceil(V/32), H*32] packed panels (see linear), GPU [V, H] as in the checkpoint
Dtypes:    hidden, zeros and table alike, bfloat16 or float32; no arithmetic
CPU:       parallel over tokens; one row is a strided read of one lane of a panel, so that a tied LM head needs no second copy
GPU:       one thread block per token, 16-byte copies; 2 H bytes read and 4 H written per row in bfloat16
Bound:     bytes = 3 T H sizeof(dtype); flops = 0
Limits:    ids are checked by the caller; GPU rows are copied in 16-byte pieces when H allows, else one element at a time
Source:    plain gather. `zeros` is the first residual stream, so that every layer starts with the same fused add and norm.
"""

from ._parallel import for_each
from ._prelude import *


def _embedding_cpu[
    dtype: DType
](hidden: Ptr[dtype], zeros: Ptr[dtype], token_ids: Ptr[DType.int32], table: Ptr[dtype], tokens: Int, h: Int):
    comptime PAIR = 2 if dtype == BF16 else 1

    def token(t: Int) {var}:
        var id = Int(token_ids[unsafe_offset=t])
        var lane = table.unsafe_offset((id // PANEL) * PANEL * h + (id % PANEL) * PAIR)
        for i in range(h // PAIR):
            comptime for p in range(PAIR):
                hidden[unsafe_offset=t * h + i * PAIR + p] = lane[unsafe_offset=i * PANEL * PAIR + p]
                zeros[unsafe_offset=t * h + i * PAIR + p] = 0

    for_each(token, tokens, 4 * tokens * h * size_of[dtype]())


def _embedding_kernel[
    dtype: DType, VEC: Int
](hidden: Ptr[dtype], zeros: Ptr[dtype], token_ids: Ptr[DType.int32], table: Ptr[dtype], h32: Int32):
    comptime ALIGN = VEC * size_of[dtype]()
    var h = Int(h32)
    launch_dependent_grids()
    wait_on_dependent_grids()
    var source = Int(token_ids[unsafe_offset=block_idx.x]) * h
    var i = thread_idx.x * VEC
    while i < h:
        var row = table.unsafe_load[width=VEC, alignment=ALIGN](source + i)
        hidden.unsafe_store[alignment=ALIGN](block_idx.x * h + i, row)
        zeros.unsafe_store[alignment=ALIGN](block_idx.x * h + i, SIMD[dtype, VEC](0))
        i += 128 * VEC


def _embedding_gpu[
    dtype: DType
](
    hidden: Ptr[dtype],
    zeros: Ptr[dtype],
    token_ids: Ptr[DType.int32],
    table: Ptr[dtype],
    tokens: Int,
    h: Int,
    ctx: DeviceContext,
) raises:
    comptime VEC = 16 // size_of[dtype]()
    if h % VEC == 0:
        comptime kernel = _embedding_kernel[dtype, VEC]
        ctx.enqueue_function[kernel](
            hidden,
            zeros,
            token_ids,
            table,
            Int32(h),
            grid_dim=tokens,
            block_dim=128,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )
    else:
        comptime kernel = _embedding_kernel[dtype, 1]
        ctx.enqueue_function[kernel](
            hidden,
            zeros,
            token_ids,
            table,
            Int32(h),
            grid_dim=tokens,
            block_dim=128,
            attributes=pdl_launch_attributes(PDLLevel.ON),
        )


@extensibility.register("mili.embedding")
struct Embedding:
    """Gathers embedding rows and starts the residual stream at zero."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        hidden: OutputTensor[rank=2, ...],
        zeros: OutputTensor[dtype=hidden.dtype, rank=2, ...],
        token_ids: InputTensor[dtype=DType.int32, rank=1, ...],
        table: InputTensor[dtype=hidden.dtype, rank=2, ...],
        ctx: DeviceContext,
    ) raises:
        """Runs the op.

        Parameters:
            target: "cpu" or "gpu".

        Args:
            hidden: Output rows [T, H].
            zeros: Output zeros [T, H].
            token_ids: Token ids [T].
            table: Embedding matrix, packed on the CPU.
            ctx: Device context.

        Raises:
            Error: If a launch fails.
        """
        var tokens = hidden.dim_size(0)
        var h = hidden.dim_size(1)
        if tokens == 0:
            return
        comptime if is_cpu[target]():
            _embedding_cpu[hidden.dtype](
                hidden.unsafe_ptr(), zeros.unsafe_ptr(), token_ids.unsafe_ptr(), table.unsafe_ptr(), tokens, h
            )
        elif is_gpu[target]():
            _embedding_gpu[hidden.dtype](
                hidden.unsafe_ptr(), zeros.unsafe_ptr(), token_ids.unsafe_ptr(), table.unsafe_ptr(), tokens, h, ctx
            )
        else:
            comptime assert False, "mili.embedding: unsupported target"
