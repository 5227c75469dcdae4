"""A mistake made on purpose, for a tool that looks for races: without it "no hazards" could mean that nothing was watched.

Math:      y[t] = x[(t + 1) % 256], by way of shared memory and without the barrier between write and read
Shapes:    y, x [256]
Dtypes:    int32
GPU:       one block
Bound:     none
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from max.gpu import barrier, thread_idx
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_gpu
from max.gpu.memory import AddressSpace
from std.memory import unsafe_stack_allocation

comptime THREADS = 256
comptime Words = MutPointer[Int32, MutAnyOrigin]


def _race_kernel(y: Words, x: Words):
    var shared = unsafe_stack_allocation[THREADS, Int32, address_space=AddressSpace.SHARED]()
    var t = thread_idx.x
    shared[unsafe_offset=t] = x[unsafe_offset=t]
    y[unsafe_offset=t] = shared[unsafe_offset=(t + 1) % THREADS]


@extensibility.register("fault.race")
struct Race:
    """Reads what a neighbour may not have written yet."""

    @staticmethod
    def execute[
        target: StaticString
    ](
        y: OutputTensor[dtype=DType.int32, rank=1, ...], x: InputTensor[dtype=DType.int32, rank=1, ...], ctx: DeviceContext
    ) raises:
        """Runs the op.

        Parameters:
            target: "gpu".

        Args:
            y: A neighbour's number [256].
            x: Numbers [256].
            ctx: Device context.

        Raises:
            Error: If the launch fails.
        """
        comptime if is_gpu[target]():
            ctx.enqueue_function[_race_kernel](y.unsafe_ptr(), x.unsafe_ptr(), grid_dim=1, block_dim=THREADS)
        else:
            comptime assert False, "fault.race: a GPU's only"
