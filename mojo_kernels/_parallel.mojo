"""When a CPU kernel wakes other threads: only if the work is worth it.

Handing work to the thread pool and waiting for it costs about 9 us on a quiet machine and far more on a busy one; one core moves
about 128 KB in that time. Work below twice that stays on the calling thread.
"""

from ._prelude import *

# --8<-- [start:for_each]
comptime GRAIN = 128 * 1024  # bytes of memory traffic, or as much time of arithmetic, that a chunk is worth at least
comptime CHUNKS_PER_WORKER = 4  # so that a core that is busy elsewhere holds up a quarter of its share only


def for_each[F: def(Int) -> None](task: F, count: Int, work: Int):
    """Calls task(0) ... task(count - 1), in parallel when `work` (bytes moved by all of them together) pays for it."""
    var chunks = min(count, work // GRAIN)
    if chunks > 1:
        chunks = min(chunks, CHUNKS_PER_WORKER * num_physical_cores())
    if chunks <= 1:
        for i in range(count):
            task(i)
        return

    def chunk(c: Int) {imm}:
        for i in range(count * c // chunks, count * (c + 1) // chunks):
            task(i)

    sync_parallelize(chunk, chunks)
# --8<-- [end:for_each]
