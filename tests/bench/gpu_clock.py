"""Time on a GPU's own clock, and the memory's speed: both by a kernel that only reads.

A launch from the host takes longer than a small kernel runs. So the reading kernel keeps the GPU busy until everything
that is timed has been enqueued behind it; then two events of the GPU tell how long that took, and the host is in it no
more. Knows no kernel of mili. Invariant: a time in which the GPU waited for the host is never returned.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from max.driver import CPU, Buffer, Device, DeviceEvent
from max.dtype import DType
from max.engine import Model

from support.graphs import LoneOp

READ_BYTES = 132 * 1024 * 16 * 8 * 64  # 1.1 GB: much more than any cache, and a quarter of a millisecond


class GpuClock:
    """Times launches on one device; holds `READ_BYTES` of its memory once it is used."""

    def __init__(self, device: Device) -> None:
        """Compiles the kernel, or finds it compiled."""
        self.device = device
        package = Path(__file__).parent / "ceilings"
        self._reader = LoneOp(device, "bench.read", package, DType.uint32, ["N"], [132, 1024])
        self._model: Model | None = None

    def start(self) -> float:
        """Make ready; returns the bytes a second of reading `READ_BYTES` of random data."""
        self._model = self._reader.load()
        words = np.random.default_rng(0).integers(0, 2**32, READ_BYTES // 4, np.uint32)
        self._x = Buffer.from_numpy(words).to(self.device)
        self._model.execute(self._x)
        self.device.synchronize()
        self._outputs = self._model.capture(0, self._x)
        self._begin, self._end = (DeviceEvent(self.device, enable_timing=True) for _ in range(2))
        self._read_seconds = 2e-4  # as long as it is not known, any guess: `seconds` makes sure
        self._read_seconds = self.seconds(self._read)
        assert int(self._outputs[0].to(CPU()).to_numpy().view(np.uint32).sum(dtype=np.uint64)) > 0
        return READ_BYTES / self._read_seconds

    def seconds(self, launch: Callable[[], None], repeats: int = 7) -> float:
        """Median time on the GPU of what one call of `launch` enqueues, behind a cold cache."""
        queue = self.device.default_queue
        launch()
        self.device.synchronize()
        start = time.perf_counter()
        launch()
        reads = 2 + int(2 * (time.perf_counter() - start) / self._read_seconds)
        self.device.synchronize()
        times: list[float] = []
        while len(times) < repeats:
            for _ in range(reads):
                self._read()
            queue.record_event(self._begin)
            launch()
            queue.record_event(self._end)
            late = self._begin.is_ready()
            self._end.synchronize()
            if late:  # the GPU had come to what is timed before all of it was there
                reads *= 2
                assert reads < 10_000, "the host cannot keep ahead of the GPU"
            else:
                times.append(self._begin.elapsed_time(self._end) / 1e3)
        return float(np.median(times))

    def _read(self) -> None:
        assert self._model is not None, "start() comes first"
        self._model.replay(0, self._x)
