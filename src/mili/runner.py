"""The device side of the engine: weights, KV cache and two compiled graphs, each executed once a step.

    submit    upload ── launch forward ── (make the sampling batch, if it is not there) ── launch sampler ──> pending

Knows arrays and devices; knows no requests, no text and no scheduling. Invariant: weights and KV cache stay on the
device, logits never leave it, and one step moves only the arrays of a `ForwardBatch` and a `SamplingBatch` in and R
tokens with their log-probabilities out.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from max import driver
from max.driver import CPU, Accelerator, Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession
from numpy.typing import NDArray

from mili import runtime_threads
from mili.batch import ForwardBatch
from mili.compiler import compiled_step, target_of
from mili.config import EngineConfig, ModelConfig
from mili.device_graphs import DecodeGraphs
from mili.errors import ConfigError
from mili.memory import LOGIT_ROWS, MemoryPlan, host_memory, plan_memory
from mili.models.loading import load_weights
from mili.models.qwen3 import FORWARD_INPUTS, SAMPLER_INPUTS
from mili.models.rope import rope_table
from mili.ops.attention import kv_cache_shapes
from mili.ops.feed_forward import exchange_shape
from mili.sampling import SamplingBatch
from mili.transfers import Landing, Landings

__all__ = ["PendingStep", "Runner", "StepOutput", "device_memory", "resolve_device"]

# MAX page-locks a pool of host memory when some is first asked for: 0.7 GB and half a second unless told otherwise.
# All buckets of 1024 requests of 65,536 tokens together need half of this, those with masks a sixth.
_HOST_POOL_BYTES = 256 << 20
_SCALARS = ("max_query_len", "max_seq_len")  # which a replay does not need
_ARRAYS = tuple(name for name in FORWARD_INPUTS if name not in _SCALARS)


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What one step made for its R rows of logits, on the host."""

    token_ids: NDArray[np.int32]  # [R]
    logprobs: NDArray[np.float32]  # [R] of the sampled, or the asked-for, token, before any filter
    ranks: NDArray[np.int32]  # [R] 1 for the likeliest
    top_ids: NDArray[np.int32]  # [R, 20] likeliest first, -1 past the row's num_logprobs
    top_logprobs: NDArray[np.float32]  # [R, 20]


@dataclass(frozen=True, slots=True, eq=False)
class PendingStep:
    """A submitted step."""

    rows: int  # of logits
    wanted: int  # leading outputs that are fetched, the others are zeros
    outputs: list[Buffer]  # on the device, with `rows` rows or more
    landing: Landing | None = None  # where they are copied to; None on the CPU, where there is nothing to wait for
    read: object = None  # by a copy into the step; kept until it is over

    def fetch(self) -> StepOutput:
        """Wait until the step is over and return its results."""
        rows, wanted = self.rows, self.wanted
        if self.landing is None:
            fetched = [output.to_numpy()[:rows] for output in self.outputs[:wanted]]
        else:
            self.landing.wait()
            fetched = self.landing.results(rows, wanted)
        shapes = [(output.dtype.to_numpy(), (rows, *output.shape[1:])) for output in self.outputs[wanted:]]
        return StepOutput(*fetched, *(np.zeros(shape, dtype) for dtype, shape in shapes))


class Runner:
    """Owns the device buffers of one model and executes steps on them; use from one thread at a time."""

    def __init__(self, folder: Path, model: ModelConfig, engine: EngineConfig) -> None:
        """Load the checkpoint in `folder` onto the device and compile, or find compiled, its graphs.

        Raises ConfigError for a device that is not there or memory that does not suffice, WeightError for a bad
        checkpoint.
        """
        started = time.perf_counter()
        self._threads = runtime_threads.of_process()
        if self._threads.process != os.getpid():
            raise ConfigError(
                f"process {self._threads.process}, of which this one is a fork, had loaded a model, and MAX's threads "
                "are not here: start processes with multiprocessing's method 'spawn'"
            )
        self.device = resolve_device(engine)
        self.max_model_len = engine.resolve_max_model_len(model)
        self.dtype = engine.resolve_dtype(model)
        on_cpu = self.device.is_host
        self.memory: MemoryPlan = plan_memory(model, engine, *device_memory(self.device), on_cpu=on_cpu)
        self.num_pages = self.memory.num_pages
        session = InferenceSession(devices=[self.device])
        ahead = None if engine.compiled is None else Path(engine.compiled)
        target = target_of(self.device)
        compiled = compiled_step(session, model, self.dtype, engine.page_size, target, ahead, engine.batch_invariant)
        compiled_at = time.perf_counter()
        self._weights = load_weights(folder, model, self.dtype, self.device)
        self._forward = session.init(compiled.forward, weights_registry=self._weights.registry)
        self._sampler = session.init(compiled.sampler, weights_registry=self._weights.registry)
        dtype = DType[self.dtype]
        shapes = kv_cache_shapes(
            model.num_hidden_layers,
            self.num_pages,
            model.num_key_value_heads,
            engine.page_size,
            model.head_dim,
            on_cpu,
        )
        self._caches = [_zeros([int(d) for d in shape], dtype, self.device) for shape in shapes]
        table = rope_table(model.rope, model.head_dim, self.max_model_len)  # [max_model_len, D] float32
        exchange = np.zeros(exchange_shape(model.hidden_size, model.intermediate_size), np.uint64)
        rotary, told = (Buffer.from_numpy(array).to(self.device) for array in (table, exchange))
        self._fixed = [rotary, *self._caches, told]
        self.device.synchronize()  # the uploads read the arrays until then
        if on_cpu:
            self._threads.give_way()
        self._landings = None if on_cpu else Landings(self.device, engine.max_num_seqs + LOGIT_ROWS)
        self._graphs: DecodeGraphs | None = None
        if not on_cpu and not engine.enforce_eager:
            self._graphs = DecodeGraphs(self._forward, self._sampler, self.device, self._fixed, engine.page_size)
        self.startup_seconds = {"compile": compiled_at - started, "load": time.perf_counter() - compiled_at}

    @property
    def looks_ahead(self) -> bool:
        """Whether `submit` takes `after`: a step's tokens can feed the next one without visiting the host."""
        return self._graphs is not None

    def submit(
        self,
        batch: ForwardBatch,
        sampling: "SamplingBatch | Callable[[], SamplingBatch]",
        after: "PendingStep | None" = None,
    ) -> "PendingStep":
        """Enqueue one step: write the batch's keys and values to the cache, sample one token per row of logits.

        On the CPU the step is over when this returns.

        Args:
            batch: What to compute; its arrays are read before this returns, and so are those of `sampling`.
            sampling: How to sample; one row for each of the batch's rows of logits. Or what makes that batch, which is
                called when the device has all it needs for the rows of logits; what it raises leaves the cache written.
            after: The step submitted last, if `batch.feeds` takes token ids from it, which `looks_ahead` allows.

        Returns:
            The step. It cannot be fetched any more once the second one after it is submitted.
        """
        with self._threads.working(self, on_cpu=self.device.is_host):
            if self._landings is None:
                # As buffers, because execute() takes some 0.2 ms to find out what a bare array is.
                inputs = [Buffer.from_numpy(getattr(batch, name)) for name in FORWARD_INPUTS]
                (hidden,) = self._forward.execute(*inputs, *self._fixed)
                made = sampling if isinstance(sampling, SamplingBatch) else sampling()
                inputs = [Buffer.from_numpy(getattr(made, name)) for name in SAMPLER_INPUTS]
                return PendingStep(len(batch.logit_rows), _wanted(made), self._sampler.execute(hidden, *inputs))
            return self._enqueue(batch, sampling, after, self._landings)

    def _enqueue(
        self,
        batch: ForwardBatch,
        sampling: "SamplingBatch | Callable[[], SamplingBatch]",
        after: "PendingStep | None",
        landings: Landings,
    ) -> "PendingStep":
        rows, landing, turn = len(batch.logit_rows), landings.next(), landings.turn
        tokens = None if after is None else after.outputs[0]
        arrays: dict[str, NDArray[Any]] = {name: getattr(batch, name) for name in _ARRAYS}
        known = _sampling_arrays(sampling) if isinstance(sampling, SamplingBatch) else None
        bucket = None if self._graphs is None else self._graphs.forward(arrays, known, turn, tokens, batch.feeds)
        if bucket is None:
            inputs = landing.upload({name: getattr(batch, name) for name in FORWARD_INPUTS}, tokens, batch.feeds)
            (hidden,) = self._forward.execute(*inputs, *self._fixed)
        else:
            hidden = bucket.hidden
        # --8<-- [start:late]
        try:
            made = sampling if isinstance(sampling, SamplingBatch) else sampling()  # the device is busy with `forward`
        except BaseException:
            landing.copy((), rows)  # nothing; but the side is free again only when `forward` has read it
            raise
        known = _sampling_arrays(made)
        # --8<-- [end:late]
        outputs = None
        if bucket is not None and self._graphs is not None:
            outputs = self._graphs.sample(bucket, known, turn)
        if outputs is None:
            inputs = landing.upload(known)
            outputs = self._sampler.execute(hidden[:rows, :], *inputs)
        wanted = _wanted(made)
        landing.copy(outputs[:wanted], rows)
        return PendingStep(rows, wanted, outputs, landing, tokens)

    def execute(self, batch: ForwardBatch, sampling: SamplingBatch) -> StepOutput:
        """Run one step and wait for it."""
        return self.submit(batch, sampling).fetch()

    def rest(self) -> None:
        """Nothing is left to compute for now: let the runtime's threads sleep until the next step."""
        self._threads.rest(self)

    def close(self) -> None:
        """Free the device memory; the runner cannot be used afterwards."""
        self.rest()
        self.device.synchronize()
        if self._graphs:
            self._graphs.close()
        for name in ("_graphs", "_landings", "_forward", "_sampler", "_caches", "_fixed", "_weights"):
            self.__dict__.pop(name, None)


def _sampling_arrays(sampling: SamplingBatch) -> dict[str, NDArray[Any]]:
    return {name: getattr(sampling, name) for name in SAMPLER_INPUTS}


def _wanted(sampling: SamplingBatch) -> int:
    """How many of the outputs a step's requests ask for: the tokens alone, or all."""
    return 5 if sampling.ints[:, 1].max() >= 0 else 1


def resolve_device(engine: EngineConfig) -> Device:
    """The device the options name; "auto" is the first GPU if there is one. Raises ConfigError if it is not there."""
    os.environ.setdefault("MODULAR_DEVICE_CONTEXT_HOST_MEMORY_MANAGER_SIZE", str(_HOST_POOL_BYTES))
    count = driver.accelerator_count()
    if engine.device_kind == "cpu" or (engine.device_kind == "auto" and count == 0):
        return CPU()
    if engine.device_id >= count:
        raise ConfigError(
            f"device {engine.device!r} asks for GPU {engine.device_id}, but this machine has {count}; use device='cpu'"
        )
    return Accelerator(engine.device_id)


def device_memory(device: Device) -> tuple[int, int]:
    """(free, total) bytes of the device's memory; the machine's for the CPU."""
    if device.is_host:
        return host_memory()
    return int(device.stats["free_memory"]), int(device.stats["total_memory"])


def _zeros(shape: list[int], dtype: DType, device: Device) -> Buffer:
    """A zeroed buffer; on the host its pages take memory only when they are first written."""
    if not device.is_host:
        return Buffer(dtype, shape, device)
    size = dtype.size_in_bytes
    array = np.zeros(shape, np.dtype(f"u{size}"))
    return Buffer.from_numpy(array).view(dtype, shape)
