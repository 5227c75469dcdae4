"""How fast this machine can read its memory: the ceiling that decoding one token is held against.

It does not know what mili reads; it only measures. The figure is a measurement of this moment, not a data sheet's.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


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
