"""The kernels on a GPU: which calls are timed, and how, so that the numbers are those of memory and not of a cache.

A call is one captured device graph with `COPIES` instances of the op in a row, each on operands of its own, and as many
such graphs take turns as it needs for their operands to be four times the L2 cache. All are enqueued before the first
runs (`bench.gpu_clock`), so the host is not in the time; the gap between two graphs is, shared by the copies. Kernels
of mili start while the one before ends, as they do in a step.
Knows no reference. Invariant: what is timed has been captured, so nothing is allocated or copied meanwhile.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from max.driver import Buffer, Device

from bench.gpu_clock import GpuClock
from kernels.inputs import Shape
from kernels.model_shapes import CASES, MODELS, Case, row_index, tiled
from kernels.specs import BY_NAME
from kernels.test_sampling import Sampler
from mili.sampling import SamplerState, SamplingBatch
from mili.sampling_params import SamplingParams
from support.kernels import Kernels

COPIES = 4  # each is compiled
COLD_BYTES = 240_000_000  # four times the L2 cache of an H200
SIZES = ("0.6B", "8B")
SQUARE = {"K": 8192, "N": 8192, "bias": False, "wide": False}  # the largest product: what the matrix unit gives

_DECODE = (1, 64, 256)
_CONTEXTS = {
    "1 on 512": ((512, 1),),
    "64 on 512": ((512, 1),) * 64,
    "256 on 512": ((512, 1),) * 256,
    "1 on 32768": ((32_768, 1),),
}
_PROMPTS = {"prompts 16 x 512": ((512, 512),) * 16, "prompt 2048": ((2048, 2048),)}


def calls(case: Case, static: Shape) -> dict[str, Shape]:
    """What is timed of an instance, by a label: batches that decode, and prompts."""
    attention = {"paged_attention": _PROMPTS, "rope_attention": {**_CONTEXTS, **_PROMPTS}}  # the first decodes nowhere
    if case.name in attention:
        return {label: {"requests": requests} for label, requests in attention[case.name].items()}
    if case.name == "take_rows":
        return {f"{rows} of 2048": {"T": 2048, "R": rows} for rows in (4, 256)}
    large = {"linear": () if static.get("wide") else (2048, 8192), "norm_linear_silu_mul": (2048, 8192)}
    prompts = large.get(case.name, (2048,))
    rows, table = (*_DECODE, *prompts), {"V": 8192} if case.name == "embedding" else {}
    return {f"{count} rows": {"M" if case.name == "linear" else "T": count, **table} for count in rows}


def instances() -> list[tuple[str, Shape]]:
    """Every instance of the timed models, `COPIES` times, and the large square product once."""
    found = [(case.name, static) for case in CASES for size in SIZES for static in case.statics(MODELS[size])]
    different = [item for i, item in enumerate(found) if item not in found[:i]]
    return [*(item for item in different for _ in range(COPIES)), ("linear", SQUARE)]


def graphs(device: Device) -> tuple[Kernels, GpuClock, Sampler]:
    """Everything that is timed, compiled."""
    return Kernels("bfloat16", instances(), device), GpuClock(device), Sampler(device)


def time_call(
    clock: GpuClock, kernels: Kernels, name: str, shape: Shape, inputs: Mapping[str, Any], moved: int, copies: int
) -> float:
    """Seconds of one instance of op `name` on cold operands."""
    first = {port: kernels.put(name, shape, port, values) for port, values in inputs.items()}
    sets = min(48, max(1, -(-COLD_BYTES // (copies * moved))))
    captured = []
    for key in range(sets):
        operands = [
            {port: value if value.is_host else value.copy() for port, value in first.items()} for _ in range(copies)
        ]
        arguments = kernels.prepare(name, shape, *operands)
        captured.append((arguments, kernels.capture(key, arguments)))

    def round_of_all() -> None:
        for key, (arguments, _) in enumerate(captured):
            kernels.replay(key, arguments)

    seconds = clock.seconds(round_of_all) / (sets * copies)
    captured.clear()
    for key in range(sets):
        kernels.release(key)
    return seconds


def time_case(
    clock: GpuClock,
    kernels: Kernels,
    case: Case,
    shape: Shape,
    copies: int = COPIES,
    held: dict[str, Buffer] | None = None,
) -> float:
    """Seconds of one instance at `shape`, on random operands; `held` keeps its weight for the next batch."""
    few = {**shape, **case.tiles}
    inputs = BY_NAME[case.name].inputs(np.random.default_rng(0), few, kernels.dtype)
    given = tiled(case, inputs, row_index(case, shape, 0))
    if case.tiles and held is not None:
        given["weight"] = held["weight"] = held.get("weight") or kernels.put(
            case.name, shape, "weight", given["weight"]
        )
    return time_call(clock, kernels, case.name, shape, given, BY_NAME[case.name].bytes_moved(shape, 2), copies)


def time_sampler(clock: GpuClock, sampler: Sampler, rows: int, vocab: int, **params: Any) -> float:
    """Seconds to sample `rows` rows of logits; alone in its graph, so the gap between two graphs is in it."""
    rng = np.random.default_rng(0)
    batch = SamplingBatch.build([SamplerState(SamplingParams(**params), [1], seed=i).row() for i in range(rows)])
    arrays = (batch.floats, batch.ints, batch.edit_starts, batch.edit_ids, batch.edit_values, batch.masks)
    rest = [Buffer.from_numpy(np.ascontiguousarray(array)).to(sampler.device) for array in arrays]
    logits = Buffer.from_numpy(3 * rng.standard_normal((rows, vocab), np.float32)).to(sampler.device)
    sets = min(48, max(2, -(-COLD_BYTES // (4 * rows * vocab))))
    copies = [logits.copy() for _ in range(sets)]
    sampler.model.execute(logits, *rest)
    sampler.device.synchronize()
    outputs = [sampler.model.capture(key, copy, *rest) for key, copy in enumerate(copies)]

    def round_of_all() -> None:
        for key, copy in enumerate(copies):
            sampler.model.replay(key, copy, *rest)

    seconds = clock.seconds(round_of_all) / sets
    outputs.clear()
    for key in range(sets):
        sampler.model.release_captured_graph(key)
    return seconds
