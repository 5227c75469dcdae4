"""Decode steps on a GPU: launch sequences that were captured once and are replayed.

A decode step (one token a request) has few shapes, so it is padded up to the next bucket of requests and of page-table
width, and the launch sequence of that bucket is captured once and replayed. Padding rows are requests of one token at
slot 0, in the scratch page. Steps with masks have buckets of their own: a mask is 19 KB a row for a vocabulary of
151,936, which the others need not upload; many such rows are left to an eager call. A step may be enqueued while the
one before it still runs: the tokens that one samples are copied into its token ids on the device.

Knows buffers and shapes; knows no requests. Invariant: a replay computes exactly what the eager call on the same arrays
would.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import Model
from numpy.typing import NDArray

from mili.transfers import Arrays, Feeds, Layout, feed, page_locked

__all__ = ["DecodeGraphs"]

_MIN_PAGES = 16  # narrowest page table worth a graph of its own
_MAX_MASK_WORDS = 1 << 19  # in a bucket: each holds them three times, twice in page-locked memory
_PER_REQUEST = ("token_ids", "positions", "slots", "seq_lens", "floats", "ints")
# What a row of padding holds where it is not zero: temperature 0 with top_p 1; no log-probabilities, target or mask.
_PADDING = {"seq_lens": 1, "floats": (0.0, 1.0, 0.0), "ints": (0, -1, -1, 0, 0, 0, -1)}


@dataclass(frozen=True, slots=True, eq=False)
class _Bucket:
    """A captured launch sequence, the buffers bound at capture, and the two sides of host memory it is fed from."""

    key: int
    block: Buffer
    token_ids: int  # where they start in the block
    inputs: list[Buffer]
    outputs: list[Buffer]  # of the bucket's number of rows; filled at capture
    sources: list[Buffer]
    arrays: list[dict[str, NDArray[Any]]]  # of the sources


class DecodeGraphs:
    """Captured decode steps of one model on one device, by bucket."""

    def __init__(self, model: Model, device: Device, fixed: list[Buffer], page_size: int) -> None:
        """`fixed` are the graph's last inputs: rotary table and caches, the same in every step."""
        self._model, self._device, self._fixed, self._page_size = model, device, fixed, page_size
        self._buckets: dict[tuple[int, int, int], _Bucket] = {}

    def submit(self, arrays: Arrays, turn: int, after: Buffer | None = None, feeds: Feeds = ()) -> list[Buffer] | None:
        """Enqueue a replay of the step, capturing its bucket first if it is new; None if it is no plain decode step.

        A plain decode step has one token and one row of logits a request, no logit edits and not too many masks.
        `turn`, 0 or 1, is the side of host memory to use; nothing on the device may still read it. `feeds` takes token
        ids from `after`, the sampled tokens of the step before. Outputs have the bucket's number of rows; the first R
        are the step's. They are overwritten by the next replay.
        """
        requests = len(arrays["seq_lens"])
        if len(arrays["token_ids"]) != requests or len(arrays["logit_rows"]) != requests:
            return None
        if int(arrays["edit_starts"][-1]):
            return None
        words = arrays["masks"].shape[1] if arrays["ints"][:, 6].max() >= 0 else 0  # of a mask; 0 without masks
        if _next_power(requests, 1) * words > _MAX_MASK_WORDS:
            return None
        # --8<-- [start:submit]
        size = (_next_power(requests, 1), _next_power(arrays["page_table"].shape[1], _MIN_PAGES), words)
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = self._new_bucket(*size)
        _write_step(bucket.arrays[turn], arrays, requests)
        bucket.block.inplace_copy_from(bucket.sources[turn])
        feed(bucket.block, bucket.token_ids, after, feeds)
        if not bucket.outputs:
            self._model.execute(*bucket.inputs)  # eagerly: lazy set-up of kernels is no part of the launch sequence
            self._device.synchronize()
            bucket.outputs.extend(self._model.capture(bucket.key, *bucket.inputs))
        self._model.replay(bucket.key, *bucket.inputs)
        return bucket.outputs
        # --8<-- [end:submit]

    def _new_bucket(self, requests: int, width: int, words: int) -> _Bucket:
        layout = Layout(
            {
                "token_ids": (requests,),
                "positions": (requests,),
                "slots": (requests,),
                "query_starts": (requests + 1,),
                "seq_lens": (requests,),
                "page_table": (requests, width),
                "logit_rows": (requests,),
                "floats": (requests, 3),
                "ints": (requests, 7),
                "edit_starts": (requests + 1,),
                "edit_ids": (1,),
                "edit_values": (1, 3),
                "masks": (requests, words) if words else (1, 1),
            }
        )
        pairs = [page_locked(DType.int32, [layout.size], self._device) for _ in range(2)]
        sides = []
        for _, host in pairs:
            host[:] = 0
            arrays = layout.arrays(host)
            arrays["query_starts"][:] = np.arange(requests + 1)
            arrays["logit_rows"][:] = np.arange(requests)
            sides.append(arrays)
        block = Buffer(DType.int32, [layout.size], self._device)
        # Grids must fit every step of the bucket.
        scalars = {"max_query_len": 1, "max_seq_len": width * self._page_size}
        inputs = [*layout.inputs(block, scalars), *self._fixed]
        key = requests << 32 | width << 1 | (words > 0)
        return _Bucket(key, block, layout.offsets["token_ids"], inputs, [], [source for source, _ in pairs], sides)

    def close(self) -> None:
        """Release every captured graph and its memory; no replay may be on its way."""
        for bucket in self._buckets.values():
            bucket.outputs.clear()
            self._model.release_captured_graph(bucket.key)
        self._buckets.clear()


def _next_power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def _write_step(target: Mapping[str, NDArray[Any]], arrays: Arrays, requests: int) -> None:
    """Write a decode step and its padding into a bucket's host memory; what never changes was written once."""
    table = arrays["page_table"]
    # Columns past a request's pages are never read, so old page ids may stay there.
    target["page_table"][:requests, : table.shape[1]] = table
    target["masks"][: len(arrays["masks"])] = arrays["masks"]
    if requests == len(target["seq_lens"]):
        for name in _PER_REQUEST:
            target[name][:] = arrays[name]
        return
    for name in _PER_REQUEST:
        target[name][:requests] = arrays[name]
        target[name][requests:] = _PADDING.get(name, 0)
    target["page_table"][requests:, 0] = 0  # the scratch page
