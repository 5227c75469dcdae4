"""Weights from the checkpoint's layout into the kernels': dtype conversion, row concatenation, CPU panels.

A CPU panel holds 32 output rows of a matrix [N, K] side by side, so that one step of the inner product over k loads
consecutive memory for 32 outputs. Panel p, output row 32 p + n:

    float32    element (k, n) at  k * 32 + n                     [K][32]
    bfloat16   element (k, n) at  (k // 2 * 32 + n) * 2 + k % 2  [K/2][32][2], pairs for the bf16 dot product

Both are one transpose of 32-bit words, a pair of bfloat16 being one word. bfloat16 is held as its bits in uint16.
Knows arrays only: no names, files or devices. Invariant: peak memory is the output plus one slab of rows per thread.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

PANEL_ROWS = 32
_THREADS = 2  # the copies are bound by memory, which two threads fill
_SLAB_BYTES = 1 << 20  # rows converted and transposed at a time: fits the cache
_STORAGE: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(np.uint16), "float32": np.dtype(np.float32)}


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """NumPy dtype that holds elements of ``dtype`` ("bfloat16": uint16 bits, "float32")."""
    return _STORAGE[dtype]


def bf16_to_f32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits, any shape, as the float32 of the same value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32, any shape, rounded to nearest even, as bfloat16 bits; NaN stays NaN, overflow becomes infinity."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    # A NaN whose payload sits in the low half would round to infinity, or carry into the sign: set its quiet bit.
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded = np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16).reshape(values.shape)


def convert(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A checkpoint array (uint16 is bfloat16, float16 or float32) as ``dtype``; itself when nothing has to change."""
    if array.dtype == storage_dtype(dtype):
        return array
    if array.dtype == np.uint16:
        return bf16_to_f32(array)
    single = array.astype(np.float32)
    return single if dtype == "float32" else f32_to_bf16(single)


def panel_shape(num_rows: int, num_columns: int) -> tuple[int, int]:
    """Shape of a packed matrix [N, K]: (panels, elements of a panel)."""
    return -(-num_rows // PANEL_ROWS), num_columns * PANEL_ROWS


def concat_rows(parts: Sequence[NDArray[Any]], dtype: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The parts, [N_i, K] or [N_i], one after the other along rows, in ``dtype``; into ``out`` when it is given."""
    num_rows = sum(len(part) for part in parts)
    if out is None:
        out = np.empty((num_rows, *parts[0].shape[1:]), storage_dtype(dtype))
    assert out.dtype == storage_dtype(dtype) and out.shape == (num_rows, *parts[0].shape[1:])

    def copy(slab: tuple[int, NDArray[Any]]) -> None:
        start, rows = slab
        out[start : start + len(rows)] = convert(rows, dtype)

    _for_each(copy, _slabs(parts))
    return out


def pack_panels(parts: Sequence[NDArray[Any]], dtype: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The parts, [N_i, K] with K even, stacked along rows and packed: [ceil(N / 32), K * 32]; missing rows are zero.

    Writes into ``out`` when it is given; it must have that shape, be C-contiguous and 4-byte aligned.
    """
    num_rows, num_columns = sum(len(part) for part in parts), parts[0].shape[1]
    shape = panel_shape(num_rows, num_columns)
    assert num_columns % 2 == 0, "pairs of bfloat16 need an even number of columns"
    if out is None:
        out = np.empty(shape, storage_dtype(dtype))
    assert out.dtype == storage_dtype(dtype) and out.shape == shape and out.flags.c_contiguous
    panels = out.view(np.uint32).reshape(shape[0], -1, PANEL_ROWS)  # [panels, words, 32]
    if num_rows % PANEL_ROWS:
        panels[-1, :, num_rows % PANEL_ROWS :] = 0

    def pack(slab: tuple[int, NDArray[Any]]) -> None:
        start, rows = slab
        words = np.ascontiguousarray(convert(rows, dtype)).view(np.uint32)  # [rows, words]
        for first, last in _panel_runs(start, start + len(rows)):
            lane = first % PANEL_ROWS
            target = panels[first // PANEL_ROWS, :, lane : lane + last - first]
            target[...] = words[first - start : last - start].T

    _for_each(pack, _slabs(parts))
    return out


def _panel_runs(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Cut the rows [first, last) where panels begin."""
    while first < last:
        end = min(last, (first // PANEL_ROWS + 1) * PANEL_ROWS)
        yield first, end
        first = end


def _slabs(parts: Sequence[NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """(row of the whole, slab of rows) of a cache-friendly size, cut on whole panels where the part allows."""
    row = 0
    for part in parts:
        row_bytes = max(part[:1].nbytes, 1)
        step = max(_SLAB_BYTES // row_bytes // PANEL_ROWS, 1) * PANEL_ROWS
        cut = step - row % PANEL_ROWS  # the first slab ends where a panel does
        for start, end in _ranges(len(part), cut, step):
            yield row + start, part[start:end]
        row += len(part)


def _ranges(length: int, first: int, step: int) -> Iterable[tuple[int, int]]:
    edges = [0, *range(min(first, length), length, step), length]
    return pairwise(edges)


def _for_each(function: Callable[[tuple[int, NDArray[Any]]], None], slabs: Iterator[tuple[int, NDArray[Any]]]) -> None:
    """Call ``function`` on every slab, on threads when that pays; NumPy copies without the interpreter lock."""
    work = list(slabs)
    if len(work) <= _THREADS:
        for slab in work:
            function(slab)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(function, work):
            pass
