"""What the device that mili runs on could do at best, and how much of its memory is taken: the ceilings of a roofline.

It does not know what mili reads or computes. Memory speed is a measurement of this moment, not a data sheet's. The
matrix unit's speed is measured on the CPU; on a GPU it is a constant, measured once on the hardware it names.
"""

import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mili.cli.roofline import Ceilings

# bfloat16 flops per second by architecture: 8192 cubed on random data, 770 to 800 TFLOP/s on an H200 (docs/LOG.md).
_GPU_MATRIX = {"sm_90a": 790e12}


def ceilings(device: str, dtype: str) -> Ceilings:
    """The ceilings of `LLM.device` for `dtype`; no matrix speed where nothing here could measure it."""
    if device == "cpu":
        return Ceilings(cpu_read_bandwidth(), cpu_matrix_rate() if dtype == "float32" else None)
    from max.driver import Accelerator

    number = int(device.removeprefix("gpu:"))
    return Ceilings(gpu_copy_bandwidth(number), gpu_matrix_rate(Accelerator(number).architecture_name, dtype))


def gpu_matrix_rate(architecture: str, dtype: str) -> float | None:
    """Flops per second that have been measured on a GPU of this architecture; None if nobody has."""
    return _GPU_MATRIX.get(architecture) if dtype == "bfloat16" else None


def memory_in_use(device: str) -> int:
    """Bytes taken on a GPU, by all who use it; on the CPU the most that this process has had in memory."""
    if device == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    from max.driver import Accelerator

    stats = Accelerator(int(device.removeprefix("gpu:"))).stats
    return int(stats["total_memory"]) - int(stats["free_memory"])


def cpu_read_bandwidth(num_bytes: int = 2**29, repeats: int = 12) -> float:
    """Bytes per second that all usable cores read together, best of `repeats` passes over `num_bytes` of memory.

    Each thread ORs its own share together, one SIMD instruction a vector: far less work than the reading costs.
    """
    num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data = np.ones(num_bytes // 8, np.int64)  # written once, so that every page is really there
    shares = np.array_split(data, num_threads)
    best = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, shares))
            best = min(best, time.perf_counter() - start)
    return num_bytes / best


def cpu_matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    """Multiplications and additions a second of NumPy's float32 matrix product, best of `repeats`."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def gpu_copy_bandwidth(device_id: int = 0, num_bytes: int = 2**30, repeats: int = 5) -> float:
    """Bytes per second read plus written by a copy inside GPU memory, best of `repeats`.

    A copy moves each byte twice, and a read alone is a little faster, so this is a ceiling on the low side.
    """
    from max.driver import Accelerator, Buffer
    from max.dtype import DType

    device = Accelerator(device_id)
    source = Buffer.zeros((num_bytes,), DType.uint8, device)
    target = Buffer.zeros((num_bytes,), DType.uint8, device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first pass warms up and counts too: it cannot be the best by mistake
        device.synchronize()
        start = time.perf_counter()
        target.inplace_copy_from(source)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * num_bytes / best
