"""One safetensors file: its header checked, its tensors as memory-mapped NumPy views.

    ┌─────────┬──────────────────────────────┬──────────────────────────────────────┐
    │ N (u64) │ JSON header, N bytes         │ tensor bytes, without holes          │
    └─────────┴──────────────────────────────┴──────────────────────────────────────┘
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, "__metadata__": {...}}

Knows the format (github.com/huggingface/safetensors, README); knows no model. Read here rather than through the
``safetensors`` package because NumPy has no bfloat16 and because ``release`` needs the offsets. Invariant: a
``TensorFile`` that exists has every tensor inside the file and no byte owned twice; a file that lies was refused.
"""

import json
import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mili.errors import WeightError

# NumPy has no bfloat16: its bits are delivered as uint16, which is unambiguous because nothing else maps to uint16.
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
# Bits of one element of every dtype the format knows, so that a foreign tensor is still checked and named.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a header."""

    dtype: str  # as the format spells it: "BF16", "F32", ...
    shape: tuple[int, ...]
    start: int  # offset in the file
    num_bytes: int


class TensorFile:
    """A checked safetensors file, mapped read-only."""

    def __init__(self, path: Path) -> None:
        """Read and check the header of ``path``. Raises WeightError naming the file and, if known, the tensor."""
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.tensors = _parse_header(path, file.read(8), file.read, size)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise WeightError(f"cannot read {path}: {error.strerror}") from error

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only view of a BF16 (as uint16), F16 or F32 tensor in its own shape; copied only if it is misaligned."""
        info = self.tensors[name]
        dtype = NUMPY_DTYPES[info.dtype]
        count = info.num_bytes // dtype.itemsize
        flat = np.frombuffer(self._map, dtype, count, info.start) if count else np.empty(0, dtype)
        return (flat if flat.flags.aligned else flat.copy()).reshape(info.shape)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory; views stay valid and read from the file again."""
        info = self.tensors[name]
        if info.num_bytes and hasattr(mmap, "MADV_DONTNEED"):
            start = info.start - info.start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.start + info.num_bytes - start)


def _parse_header(path: Path, prefix: bytes, read: Any, size: int) -> dict[str, TensorInfo]:
    if len(prefix) < 8:
        raise WeightError(f"{path} is truncated: {size} bytes is no safetensors file; download it again")
    if prefix.startswith(b"version "):
        raise WeightError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    length = int.from_bytes(prefix, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise WeightError(f"{path} is not a safetensors file: header length {length}, limit {MAX_HEADER_BYTES} bytes")
    if 8 + length > size:
        raise WeightError(f"{path} is truncated: header of {length} bytes in a file of {size}; download it again")
    try:
        header = json.loads(read(length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise WeightError(f"{path}: the safetensors header is corrupt ({error}); download the file again") from error
    if not isinstance(header, dict):
        raise WeightError(f"{path}: the safetensors header is corrupt (not an object); download the file again")
    header.pop("__metadata__", None)
    tensors = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    def corrupt(what: str) -> WeightError:
        return WeightError(f"{path}: the header entry of tensor {name} is corrupt: {what}; download the file again")

    if not isinstance(entry, dict):
        raise corrupt(f"{entry!r} is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise corrupt(f"unknown dtype {dtype!r}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            raise corrupt(f"{key} {value!r} is not a list of sizes")
    assert isinstance(shape, list) and isinstance(offsets, list)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"data_offsets {offsets} is not a range")
    num_bytes = offsets[1] - offsets[0]
    if math.prod(shape) * _DTYPE_BITS[dtype] != num_bytes * 8:
        raise corrupt(f"{dtype} of shape {shape} does not take {num_bytes} bytes")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    end, previous = data_start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start < end:
            raise WeightError(f"{path}: tensors {previous} and {name} overlap; the file is corrupt, download it again")
        if info.start > end:
            raise WeightError(f"{path}: {info.start - end} bytes before tensor {name} belong to no tensor")
        end, previous = info.start + info.num_bytes, name
        if end > size:
            raise WeightError(
                f"{path} is truncated: tensor {name} ends at byte {end} of a file of {size}; download it again"
            )
    if end != size:
        raise WeightError(f"{path}: {size - end} bytes after the last tensor belong to no tensor")
