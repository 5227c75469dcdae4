"""How a step reaches a GPU: one copy of all its arrays, and decode steps replayed as captured device graphs.

A step's arrays travel as one block of 32-bit words; the graph's inputs are views into it:

    block    | token_ids | pad | positions | pad | slots | pad | ...        each array starts on a 256-byte border

A decode step (one token a request) has few shapes, so it is padded up to the next bucket of requests and of page-table
width, and the launch sequence of that bucket is captured once and replayed. Padding rows are requests of one token at
slot 0, in the scratch page. Knows buffers and shapes; knows no requests. Invariant: a replay computes exactly what the
eager call on the same arrays would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import Model
from numpy.typing import NDArray

from mili.models.qwen3 import INPUT_NAMES

__all__ = ["DecodeGraphs", "upload"]

Arrays = Mapping[str, NDArray[Any]]

_BORDER_WORDS = 64  # 256 bytes: what a fresh allocation would be aligned to
_HOST_SCALARS = ("max_query_len", "max_seq_len")
_MIN_PAGES = 16  # narrowest page table worth a graph of its own


def upload(arrays: Arrays, device: Device) -> tuple[list[Buffer], NDArray[np.int32]]:
    """Copy a step's arrays to the device in one block; returns the graph's inputs and the host block they come from.

    The copy is asynchronous: the caller keeps the block until the step's results are on the host.
    """
    layout, size = _layout({name: arrays[name].shape for name in INPUT_NAMES})
    host = np.zeros(size, np.int32)
    _fill(host, layout, arrays)
    block = Buffer.from_numpy(host).to(device)
    return _views(block, layout, arrays), host


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One captured bucket: its host and device blocks, the inputs and outputs bound at capture."""

    key: int
    layout: dict[str, tuple[int, tuple[int, ...]]]
    host: NDArray[np.int32]
    source: Buffer  # the host block as a Buffer, so that refreshing allocates nothing
    block: Buffer
    inputs: list[Buffer]
    outputs: list[Buffer]


class DecodeGraphs:
    """Captured decode steps of one model on one device, by bucket."""

    def __init__(self, model: Model, device: Device, fixed: list[Buffer], page_size: int) -> None:
        """`fixed` are the graph's last inputs: rotary table and caches, the same in every step."""
        self._model, self._device, self._fixed, self._page_size = model, device, fixed, page_size
        self._captured: dict[tuple[int, int], _Captured] = {}

    def run(self, arrays: Arrays) -> list[Buffer] | None:
        """Replay the step, capturing its bucket first if it is new; None if it is no plain decode step.

        A plain decode step has one token and one row of logits a request, and no logit edits or masks. Outputs have
        the bucket's number of rows; the first R are the step's. They are overwritten by the next replay.
        """
        requests = len(arrays["seq_lens"])
        if len(arrays["token_ids"]) != requests or len(arrays["logit_rows"]) != requests:
            return None
        # Room for masks in every bucket would be uploaded with every step: 19 KB a row, for a vocabulary of 151,936.
        if int(arrays["edit_starts"][-1]) or (arrays["ints"][:, 6] >= 0).any():
            return None
        width = arrays["page_table"].shape[1]
        bucket = (_next_power(requests, 1), _next_power(width, _MIN_PAGES))
        captured = self._captured.get(bucket)
        if captured is None:
            return self._capture(bucket, arrays).outputs
        _fill(captured.host, captured.layout, _pad(arrays, *bucket, self._page_size))
        captured.block.inplace_copy_from(captured.source)
        self._model.replay(captured.key, *captured.inputs)
        return captured.outputs

    def _capture(self, bucket: tuple[int, int], arrays: Arrays) -> _Captured:
        padded = _pad(arrays, *bucket, self._page_size)
        layout, size = _layout({name: padded[name].shape for name in INPUT_NAMES})
        host = np.zeros(size, np.int32)
        _fill(host, layout, padded)
        source = Buffer.from_numpy(host)
        block = source.to(self._device)
        inputs = [*_views(block, layout, padded), *self._fixed]
        key = bucket[0] << 32 | bucket[1]
        # Once eagerly: lazy set-up of kernels is no part of the launch sequence.
        self._model.execute(*inputs)
        self._device.synchronize()
        outputs = self._model.capture(key, *inputs)
        self._model.replay(key, *inputs)
        self._captured[bucket] = _Captured(key, layout, host, source, block, inputs, outputs)
        return self._captured[bucket]

    def close(self) -> None:
        """Release every captured graph and its memory."""
        for captured in self._captured.values():
            captured.outputs.clear()
            self._model.release_captured_graph(captured.key)
        self._captured.clear()


def _next_power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def _pad(arrays: Arrays, requests: int, width: int, page_size: int) -> dict[str, NDArray[Any]]:
    """The step of a whole bucket: extra requests of one token each, which read and write slot 0 only."""
    extra = requests - len(arrays["seq_lens"])

    def more(name: str, value: float) -> NDArray[Any]:
        array = arrays[name]
        return np.concatenate([array, np.full((extra, *array.shape[1:]), value, array.dtype)])

    table = np.zeros((requests, width), np.int32)  # [requests, width]; page 0 is the scratch page
    given = arrays["page_table"]
    table[: given.shape[0], : given.shape[1]] = given
    floats = more("floats", 0.0)  # temperature 0: the cheapest row
    floats[requests - extra :, 1] = 1.0
    ints = more("ints", 0)
    ints[requests - extra :, [1, 2, 6]] = -1  # no log-probabilities, no target, no mask
    return {
        "token_ids": more("token_ids", 0),
        "positions": more("positions", 0),
        "slots": more("slots", 0),
        "query_starts": np.arange(requests + 1, dtype=np.int32),
        "seq_lens": more("seq_lens", 1),
        "page_table": table,
        "logit_rows": np.arange(requests, dtype=np.int32),
        "floats": floats,
        "ints": ints,
        "edit_starts": np.zeros(requests + 1, np.int32),
        "edit_ids": arrays["edit_ids"][:1],
        "edit_values": arrays["edit_values"][:1],
        "masks": arrays["masks"][:1],
        "max_query_len": np.array(1, np.int32),
        "max_seq_len": np.array(width * page_size, np.int32),  # grids must fit every step of the bucket
    }


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Word offset and shape of each array in the block, and the block's words."""
    layout = {}
    offset = 0
    for name, shape in shapes.items():
        if name in _HOST_SCALARS:
            continue
        layout[name] = (offset, shape)
        offset += -(-int(np.prod(shape)) // _BORDER_WORDS) * _BORDER_WORDS
    return layout, offset


def _fill(host: NDArray[np.int32], layout: Mapping[str, tuple[int, tuple[int, ...]]], arrays: Arrays) -> None:
    for name, (offset, _) in layout.items():
        words = np.ascontiguousarray(arrays[name]).view(np.int32).reshape(-1)
        host[offset : offset + words.size] = words


def _views(block: Buffer, layout: Mapping[str, tuple[int, tuple[int, ...]]], arrays: Arrays) -> list[Buffer]:
    """The graph's inputs in order: views into the block, and host scalars."""
    inputs = []
    for name in INPUT_NAMES:
        if name in _HOST_SCALARS:
            inputs.append(Buffer.from_numpy(np.array(arrays[name], np.int32)))
            continue
        offset, shape = layout[name]
        words = block[offset : offset + int(np.prod(shape))]
        inputs.append(words.view(DType.from_numpy(arrays[name].dtype), list(shape)))
    return inputs
