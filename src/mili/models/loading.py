"""From a checked checkpoint to the arrays a graph binds: fused, converted, packed for the CPU or copied to a GPU.

Knows where weights end up; what they are called and made of is `qwen3.weight_specs`, how the CPU packs them is
`packing`. Invariant: every weight of the graph is bound to an array of exactly its dtype and shape, because MAX itself
would read past a wrong one.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from numpy.typing import NDArray

from mili.config import ModelConfig
from mili.models.packing import concat_rows, pack_panels, panel_shape, storage_dtype
from mili.models.qwen3 import WeightSpec, weight_specs
from mili.models.weights import Checkpoint

__all__ = ["Weights", "load_weights"]

_ALIGNMENT = 64  # of each weight in the arena: a cache line, and a vector of the widest CPU


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What the graph is initialised with, and the host memory it aliases."""

    registry: dict[str, Buffer]
    arena: mmap.mmap | None  # keeps CPU weights alive: the registry's buffers only point into it


def load_weights(folder: Path, config: ModelConfig, dtype: str, device: Device) -> Weights:
    """Load the checkpoint in `folder` as `dtype` ("bfloat16", "float32") onto `device`.

    Each tensor is read from the mapped file once and its pages are dropped, so resident memory stays near one copy.
    Raises WeightError before any data is read if the checkpoint does not fit the config.
    """
    checkpoint = Checkpoint(folder, config)
    specs = weight_specs(config)
    if not device.is_host:
        return Weights({spec.name: _upload(checkpoint, spec, dtype, device) for spec in specs}, None)
    item = storage_dtype(dtype)
    shapes = [panel_shape(*spec.shape) if len(spec.shape) == 2 else spec.shape for spec in specs]
    sizes = [-(-int(np.prod(shape)) * item.itemsize // _ALIGNMENT) * _ALIGNMENT for shape in shapes]
    arena = mmap.mmap(-1, sum(sizes))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)  # weights are streamed: fewer, larger pages mean fewer address misses
    registry = {}
    offset = 0
    for spec, shape, size in zip(specs, shapes, sizes, strict=True):
        target = np.frombuffer(arena, item, int(np.prod(shape)), offset).reshape(shape)
        parts = [checkpoint.tensor(name) for name in spec.parts]
        (pack_panels if len(shape) == 2 else concat_rows)(parts, dtype, target)
        _release(checkpoint, spec.parts)
        registry[spec.name] = _as_dtype(target, dtype)
        offset += size
    return Weights(registry, arena)


def _upload(checkpoint: Checkpoint, spec: WeightSpec, dtype: str, device: Device) -> Buffer:
    """One weight [N, K] or [N] on the device, row-major as in the checkpoint."""
    parts = [checkpoint.tensor(name) for name in spec.parts]
    whole = len(parts) == 1 and parts[0].dtype == storage_dtype(dtype)
    host = parts[0] if whole else concat_rows(parts, dtype)
    assert host.shape == spec.shape, (spec, host.shape)
    buffer = _as_dtype(host, dtype).to(device)
    device.synchronize()  # the copy reads `host`, which must outlive it
    _release(checkpoint, spec.parts)
    return buffer


def _as_dtype(array: NDArray[Any], dtype: str) -> Buffer:
    """The array as a Buffer of `dtype`, sharing its memory; bfloat16 is relabelled from its bits."""
    buffer = Buffer.from_numpy(array)
    return buffer.view(DType.bfloat16, list(array.shape)) if dtype == "bfloat16" else buffer


def _release(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    for name in names:
        checkpoint.release(name)
