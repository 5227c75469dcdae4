"""What a GPU's memory gives to a kernel that only reads: the ceiling that the kernels' bytes per second are held against.

Math:      y[b, t] = xor over i of x[(i * blocks + b) * threads * 16 + t * 16 ...]
Shapes:    y [132, 1024], x [N], N a multiple of 132 * 1024 * 16 * UNROLL
Dtypes:    uint32
GPU:       one block of 1024 threads a multiprocessor of an H200, UNROLL independent loads of 16 bytes in flight a thread
Bound:     bytes = 4 N
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu import block_idx, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_gpu

comptime BLOCKS = 132
comptime THREADS = 1024
comptime WIDTH = 4
comptime UNROLL = 8
comptime Words = MutPointer[Scalar[DType.uint32], MutAnyOrigin]


def _read_kernel(y: Words, x: Words, rounds: Int32):
    var at = (block_idx.x * THREADS + thread_idx.x) * WIDTH
    comptime step = BLOCKS * THREADS * WIDTH
    var found = SIMD[DType.uint32, WIDTH](0)
    for _ in range(Int(rounds)):
        comptime for u in range(UNROLL):
            found ^= x.unsafe_load[width=WIDTH, alignment=16](at + u * step)
        at += UNROLL * step
    y[unsafe_offset=block_idx.x * THREADS + thread_idx.x] = found.reduce_add()


@extensibility.register("bench.read")
struct Read:
    """Reads all of an array."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        y: OutputTensor[dtype=DType.uint32, rank=2, ...], x: InputTensor[dtype=DType.uint32, rank=1, ...], ctx: DeviceContext
    ) raises:
        """Runs the op.

        Parameters:
            target: "gpu".

        Args:
            y: What a thread has read, so that it must [132, 1024].
            x: The array.
            ctx: Device context.

        Raises:
            Error: If the launch fails.
        """
        comptime if is_gpu[target]():
            var rounds = x.dim_size(0) // (BLOCKS * THREADS * WIDTH * UNROLL)
            ctx.enqueue_function[_read_kernel](
                y.unsafe_ptr(), x.unsafe_ptr(), Int32(rounds), grid_dim=BLOCKS, block_dim=THREADS
            )
        else:
            comptime assert False, "bench.read: a GPU's only"
