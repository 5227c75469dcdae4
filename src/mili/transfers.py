"""How a step's arrays reach a GPU and its results come back: one copy in, one copy out for each result wanted.

A step's arrays travel as one block of 32-bit words; the graphs' inputs are views into it:

    block    | token_ids | pad | positions | pad | slots | pad | ...        each array starts on a 256-byte border

Copies are only enqueued. What they read and write on the host is page-locked memory of two sides that take turns, so
that one step can be on its way while the one before it is taken in. Knows buffers and shapes; knows no requests.
Invariant: everything happens in the order of the device's one queue, and a side is written again only after the device
has gone past the step that used it last.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from max.driver import Buffer, Device, DeviceEvent, Usage
from max.dtype import DType
from numpy.typing import NDArray

__all__ = ["Arrays", "Feeds", "Landing", "Landings", "Layout", "feed", "page_locked"]

Arrays = Mapping[str, NDArray[Any]]
Feeds = Sequence[tuple[int, int, int]]  # the fields of mili.batch.Feed

_BORDER_WORDS = 64  # 256 bytes: what a fresh allocation would be aligned to
_LEAST_WORDS = 1 << 15  # of a side's memory for each graph's arrays
_HOST_SCALARS = ("max_query_len", "max_seq_len")
_FLOATS = ("floats", "edit_values")
_RESULTS = ((DType.int32, ()), (DType.float32, ()), (DType.int32, ()), (DType.int32, (20,)), (DType.float32, (20,)))


class Layout:
    """Where each of a step's arrays lies in its block."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """`shapes` are those of a step's arrays in order; scalars, which stay on the host, take no room."""
        self._shapes = shapes
        self.offsets: dict[str, int] = {}  # in words
        self.size = 0  # words of the block
        for name, shape in shapes.items():
            if name not in _HOST_SCALARS:
                self.offsets[name] = self.size
                self.size += -(-int(np.prod(shape)) // _BORDER_WORDS) * _BORDER_WORDS

    def arrays(self, host: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
        """The arrays inside a block on the host, by name."""
        found = {}
        for name, offset in self.offsets.items():
            words = host[offset : offset + int(np.prod(self._shapes[name]))]
            found[name] = words.view(np.float32 if name in _FLOATS else np.int32).reshape(self._shapes[name])
        return found

    def inputs(self, names: Iterable[str], block: Buffer, scalars: Mapping[str, int]) -> list[Buffer]:
        """The inputs `names` of a graph: views into a block on the device, and host scalars."""
        inputs = []
        for name in names:
            if name in _HOST_SCALARS:
                inputs.append(Buffer.from_numpy(np.array(scalars[name], np.int32)))
                continue
            offset, shape = self.offsets[name], self._shapes[name]
            words = block[offset : offset + int(np.prod(shape))]
            inputs.append(words.view(DType.float32 if name in _FLOATS else DType.int32, list(shape)))
        return inputs


def feed(block: Buffer, token_ids: int, after: Buffer | None, feeds: Feeds) -> None:
    """Enqueue copies of sampled tokens, `after` of the step before, to the token ids that start in a step's block."""
    for row, logit_row, count in feeds:
        assert after is not None, "token ids of a step before, and no such step"
        start = token_ids + row
        block[start : start + count].inplace_copy_from(after[logit_row : logit_row + count])


def page_locked(dtype: DType, shape: Sequence[int], device: Device) -> tuple[Buffer, NDArray[Any]]:
    """Host memory that the device copies to and from on its own, and the array that shares it.

    Nothing tells when a copy is over but the events of `Landings`.
    """
    buffer = Buffer(dtype, shape, device, Usage.STAGING | Usage.UNTRACKED)
    return buffer, buffer.to_numpy()


class _Staging:
    """Page-locked memory for one graph's arrays, which grows when a step needs more."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._source, self._host = page_locked(DType.int32, [_LEAST_WORDS], device)

    def room(self, size: int) -> tuple[Buffer, NDArray[np.int32]]:
        """Its first `size` words, which no step on its way may still read."""
        if size > len(self._host):
            self._source, self._host = page_locked(DType.int32, [1 << (size - 1).bit_length()], self._device)
        return self._source[:size], self._host[:size]


class Landing:
    """One side's host memory, for results and for the arrays of steps that are not replayed."""

    def __init__(self, device: Device, max_rows: int) -> None:
        self._device = device
        self._for_forward, self._for_sampler = _Staging(device), _Staging(device)
        pairs = [page_locked(dtype, (max_rows, *shape), device) for dtype, shape in _RESULTS]
        self._buffers = [buffer for buffer, _ in pairs]
        self._arrays = [array for _, array in pairs]
        self._queue = device.default_queue
        self._event = DeviceEvent(device)
        self._queue.record_event(self._event)

    def upload(self, arrays: Arrays, after: Buffer | None = None, feeds: Feeds = ()) -> list[Buffer]:
        """Enqueue the copy of a graph's arrays to the device, and what `feed` does; returns the graph's inputs.

        Once a step for each of the two graphs.
        """
        staging = self._for_forward if "token_ids" in arrays else self._for_sampler
        layout = Layout({name: array.shape for name, array in arrays.items()})
        source, host = staging.room(layout.size)
        for name, view in layout.arrays(host).items():
            view[...] = arrays[name]
        block = Buffer(DType.int32, [layout.size], self._device)
        block.inplace_copy_from(source)
        if feeds:
            feed(block, layout.offsets["token_ids"], after, feeds)
        return layout.inputs(arrays, block, {name: int(arrays[name]) for name in _HOST_SCALARS if name in arrays})

    def copy(self, outputs: Sequence[Buffer], rows: int) -> None:
        """Enqueue the copies of the first `rows` rows of the outputs, which end the step that uses this side."""
        for output, buffer in zip(outputs, self._buffers, strict=False):
            leading = (slice(rows), *[slice(None)] * (output.rank - 1))
            buffer[leading].inplace_copy_from(output[leading])
        self._queue.record_event(self._event)

    def wait(self) -> None:
        """Until the step that used this side last is over."""
        self._event.synchronize()

    def results(self, rows: int, wanted: int) -> list[NDArray[Any]]:
        """What was copied last, after `wait`: `rows` rows of the first `wanted` outputs."""
        return [array[:rows].copy() for array in self._arrays[:wanted]]


class Landings:
    """The two sides."""

    def __init__(self, device: Device, max_rows: int) -> None:
        """`max_rows` is the most rows of logits in a step."""
        self._sides = (Landing(device, max_rows), Landing(device, max_rows))
        self.turn = 0

    def next(self) -> Landing:
        """The side for the next step, which `turn` tells, once the step before the last is over."""
        self.turn ^= 1
        side = self._sides[self.turn]
        side.wait()
        return side
