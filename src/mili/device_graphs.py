"""Decode steps on a GPU: launch sequences that were captured once and are replayed.

A decode step (one token a request) has few shapes, so it is padded up to the next bucket of requests and of page-table
width, and the launch sequences of that bucket, `forward` and `sampler`, are captured once and replayed. Padding rows
are requests of one token at slot 0, in the scratch page.

What a step samples with is there before it, and travels with its other arrays in one copy, or is made while `forward`
runs: masks, 19 KB a row for a vocabulary of 151,936, which a bucket has room for apart from what the others upload.
Rows with logit edits, and too many masks, are left to an eager call of `sampler`. A step may be enqueued while the one
before it still runs: the tokens that one samples are copied into its token ids on the device.

Knows buffers and shapes; knows no requests. Invariant: a replay computes exactly what the eager calls on the same
arrays would.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import Model
from numpy.typing import NDArray

from mili.models.qwen3 import FORWARD_INPUTS, SAMPLER_INPUTS
from mili.transfers import Arrays, Feeds, Layout, feed, page_locked

__all__ = ["Bucket", "DecodeGraphs"]

_MIN_PAGES = 16  # narrowest page table worth a graph of its own
_MAX_MASK_WORDS = 1 << 19  # in a bucket: each holds them three times, twice in page-locked memory
_PER_REQUEST = ("token_ids", "positions", "slots", "seq_lens", "floats", "ints")
# What a row of padding holds where it is not zero: temperature 0 with top_p 1; no log-probabilities, target or mask.
_PADDING = {"seq_lens": 1, "floats": (0.0, 1.0, 0.0), "ints": (0, -1, -1, 0, 0, 0, -1)}


class _Fed:
    """A block on the device and the two sides of page-locked memory that take turns to fill it."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: Device) -> None:
        self.layout = Layout(shapes)
        self.block = Buffer(DType.int32, [self.layout.size], device)
        pairs = [page_locked(DType.int32, [self.layout.size], device) for _ in range(2)]
        for _, host in pairs:
            host[:] = 0
        self._sources = [source for source, _ in pairs]
        self.arrays: list[dict[str, NDArray[Any]]] = [self.layout.arrays(host) for _, host in pairs]

    def copy(self, turn: int, start: int, end: int) -> None:
        """Enqueue the copy of these words of one side."""
        self.block[start:end].inplace_copy_from(self._sources[turn][start:end])


@dataclass(slots=True, eq=False)
class _Captured:
    """A launch sequence of one model, captured when it is first run, and the buffers bound then."""

    model: Model
    key: int
    inputs: list[Buffer]
    outputs: list[Buffer] = field(default_factory=list)  # of the bucket's number of rows

    def run(self, device: Device) -> list[Buffer]:
        """Enqueue it; the outputs are overwritten by the next time."""
        # --8<-- [start:capture]
        if not self.outputs:
            self.model.execute(*self.inputs)  # eagerly: lazy set-up of kernels is no part of the launch sequence
            device.synchronize()
            self.outputs.extend(self.model.capture(self.key, *self.inputs))
        self.model.replay(self.key, *self.inputs)
        return self.outputs
        # --8<-- [end:capture]

    def release(self) -> None:
        self.outputs.clear()
        self.model.release_captured_graph(self.key)


@dataclass(slots=True, eq=False)
class Bucket:
    """What is captured for one number of requests and one width of page table."""

    fed: _Fed  # first the arrays of `forward`, then those of `sampler` without masks
    forward: _Captured
    plain: _Captured | None = None  # `sampler` without masks
    masks: _Fed | None = None  # the arrays of `sampler` with masks
    masked: _Captured | None = None
    num_sent: int = 0  # words of `fed` that the step on its way has copied

    @property
    def hidden(self) -> Buffer:
        """[requests, H] what `forward` makes."""
        return self.forward.outputs[0]


class DecodeGraphs:
    """Captured decode steps of one pair of models on one device, by bucket."""

    def __init__(self, forward: Model, sampler: Model, device: Device, fixed: list[Buffer], page_size: int) -> None:
        """`fixed` are the last inputs of `forward`: rotary table, caches and exchange, the same in every step."""
        self._forward, self._sampler, self._device = forward, sampler, device
        self._fixed, self._page_size = fixed, page_size
        self._buckets: dict[tuple[int, int], Bucket] = {}

    def forward(
        self, arrays: Arrays, sampling: Arrays | None, turn: int, after: Buffer | None = None, feeds: Feeds = ()
    ) -> Bucket | None:
        """Enqueue a replay of a step's `forward`, capturing it first if it is new; None if it is no decode step.

        A decode step has one token and one row of logits a request. `sampling` are the arrays that `sample` will get,
        if they are known. `turn`, 0 or 1, is the side of host memory to use; nothing on the device may still read it.
        `feeds` takes token ids from `after`, the sampled tokens of the step before.
        """
        requests = len(arrays["seq_lens"])
        if len(arrays["token_ids"]) != requests or len(arrays["logit_rows"]) != requests:
            return None
        size = (_next_power(requests, 1), _next_power(arrays["page_table"].shape[1], _MIN_PAGES))
        bucket = self._buckets.get(size)
        if bucket is None:
            bucket = self._buckets[size] = self._new_bucket(*size)
        # --8<-- [start:submit]
        fed = bucket.fed
        _write(fed.arrays[turn], arrays, requests)
        table = arrays["page_table"]
        # Columns past a request's pages are never read, so old page ids may stay there; a row of padding has page 0.
        fed.arrays[turn]["page_table"][:requests, : table.shape[1]] = table
        fed.arrays[turn]["page_table"][requests:, 0] = 0
        bucket.num_sent = fed.layout.offsets["floats"]
        if sampling is not None and _is_plain(sampling):
            _write(fed.arrays[turn], sampling, requests)
            bucket.num_sent = fed.layout.size
        fed.copy(turn, 0, bucket.num_sent)
        feed(fed.block, fed.layout.offsets["token_ids"], after, feeds)
        bucket.forward.run(self._device)
        return bucket
        # --8<-- [end:submit]

    def sample(self, bucket: Bucket, sampling: Arrays, turn: int) -> list[Buffer] | None:
        """Enqueue a replay of the rest of the step that `forward` began; None if it has edits or too many masks.

        Outputs have the bucket's number of rows; the first R are the step's. The next replay overwrites them.
        """
        requests = len(sampling["ints"])
        if int(sampling["edit_starts"][-1]):
            return None
        if not _is_plain(sampling):
            return self._sample_masked(bucket, sampling, turn)
        fed = bucket.fed
        if bucket.num_sent < fed.layout.size:
            _write(fed.arrays[turn], sampling, requests)
            fed.copy(turn, bucket.num_sent, fed.layout.size)
        if bucket.plain is None:
            inputs = fed.layout.inputs(SAMPLER_INPUTS, fed.block, {})
            bucket.plain = _Captured(self._sampler, bucket.forward.key, [bucket.hidden, *inputs])
        return bucket.plain.run(self._device)

    def _sample_masked(self, bucket: Bucket, sampling: Arrays, turn: int) -> list[Buffer] | None:
        rows, words = bucket.hidden.shape[0], sampling["masks"].shape[1]
        if rows * words > _MAX_MASK_WORDS:
            return None
        if bucket.masks is None:
            bucket.masks = _Fed(_sampler_shapes(rows, (rows, words)), self._device)
            inputs = bucket.masks.layout.inputs(SAMPLER_INPUTS, bucket.masks.block, {})
            bucket.masked = _Captured(self._sampler, bucket.forward.key | 1, [bucket.hidden, *inputs])
        assert bucket.masked is not None
        arrays = bucket.masks.arrays[turn]
        _write(arrays, sampling, len(sampling["ints"]))
        arrays["masks"][: len(sampling["masks"])] = sampling["masks"]
        bucket.masks.copy(turn, 0, bucket.masks.layout.size)
        return bucket.masked.run(self._device)

    def _new_bucket(self, requests: int, width: int) -> Bucket:
        shapes = {
            "token_ids": (requests,),
            "positions": (requests,),
            "slots": (requests,),
            "query_starts": (requests + 1,),
            "seq_lens": (requests,),
            "page_table": (requests, width),
            "logit_rows": (requests,),
            **_sampler_shapes(requests, (1, 1)),
        }
        fed = _Fed(shapes, self._device)
        for arrays in fed.arrays:
            arrays["query_starts"][:] = np.arange(requests + 1)
            arrays["logit_rows"][:] = np.arange(requests)
        # Grids must fit every step of the bucket.
        scalars = {"max_query_len": 1, "max_seq_len": width * self._page_size}
        inputs = [*fed.layout.inputs(FORWARD_INPUTS, fed.block, scalars), *self._fixed]
        return Bucket(fed, _Captured(self._forward, requests << 32 | width << 1, inputs))

    def close(self) -> None:
        """Release every captured graph and its memory; no replay may be on its way."""
        for bucket in self._buckets.values():
            for captured in (bucket.masked, bucket.plain, bucket.forward):
                if captured is not None:
                    captured.release()
        self._buckets.clear()


def _sampler_shapes(rows: int, masks: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {
        "floats": (rows, 3),
        "ints": (rows, 7),
        "edit_starts": (rows + 1,),
        "edit_ids": (1,),
        "edit_values": (1, 3),
        "masks": masks,
    }


def _next_power(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


def _is_plain(sampling: Arrays) -> bool:
    """Whether no row has logit edits or a mask."""
    return not int(sampling["edit_starts"][-1]) and int(sampling["ints"][:, 6].max()) < 0


def _write(target: Mapping[str, NDArray[Any]], arrays: Arrays, requests: int) -> None:
    """Write what arrays has for each request, and its padding, into a bucket's host memory."""
    for name in _PER_REQUEST:
        if name in arrays:
            target[name][:requests] = arrays[name]
            if requests < len(target[name]):
                target[name][requests:] = _PADDING.get(name, 0)
