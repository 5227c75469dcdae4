"""Names that move between releases of Mojo and MAX, imported once and re-exported.

Everything a kernel file needs from the standard library or from MAX comes from here, so that an upgrade that renames a
module is one edit. Also the few types and constants that every kernel shares.
"""

import extensibility
from extensibility import InputTensor, OutputTensor
from extensibility import _MutableInputTensor as MutableInputTensor
from max.algorithm import sync_parallelize
from max.gpu import WARP_SIZE, AddressSpace, barrier, block_idx, lane_id, thread_idx, warp_id
from max.gpu.host import DeviceContext
from max.gpu.host.info import is_cpu, is_gpu
from max.gpu.primitives import warp
from max.gpu.primitives.grid_controls import PDLLevel, launch_dependent_grids
from max.gpu.primitives.grid_controls import pdl_launch_attributes, wait_on_dependent_grids
from std.math import ceildiv, exp, iota, sqrt
from std.memory import bitcast, unsafe_stack_allocation
from std.sys import CompilationTarget, is_nvidia_gpu, llvm_intrinsic, simd_width_of, size_of
from std.sys.info import num_physical_cores

comptime F32 = DType.float32
comptime BF16 = DType.bfloat16

# Every pointer a kernel takes; struct fields may not have an any-origin, so they hold the second kind.
comptime Ptr[dtype: DType] = MutPointer[Scalar[dtype], MutAnyOrigin]
comptime FieldPtr[dtype: DType] = MutPointer[Scalar[dtype], MutUntrackedOrigin]

# Output rows of a weight that the CPU keeps side by side; the Python packing code writes the same number.
comptime PANEL = 32
