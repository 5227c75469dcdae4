"""Run mili's kernels on NumPy arrays: one compiled graph holds many independent instances of the ops.

Compiling costs per graph and hardly per op, so all instances of a dtype share a graph, and a call gives inputs without
rows to the instances it does not use. Knows how the reference's plain layouts become the device's (on the CPU weights
in panels and the keys of a page side by side); knows no expected values. Invariant: a call leaves its inputs alone.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from max.driver import CPU, Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import BufferType, DeviceRef, Graph, TensorType, TensorValue

from mili.ops import _call
from mili.ops.activation import silu_mul
from mili.ops.attention import CacheView, kv_cache_shapes, paged_attention, qk_norm_rope_store, rope_attention
from mili.ops.embedding import embedding
from mili.ops.feed_forward import exchange_shape, feed_forward
from mili.ops.linear import linear, linear_weight_shape
from mili.ops.norm import add_rms_norm
from mili.ops.norm_linear import norm_linear, norm_linear_silu_mul
from mili.ops.take_rows import take_rows
from support.graphs import compiled_graph
from support.reference import Array, Arrays

Statics = Mapping[str, Any]
Port = tuple[DType, tuple[int | str, ...]]  # dtype and shape of an input; a string is a symbolic dim

EPS = 1e-6
LAYERS = 2  # of the caches
PANEL = 32
SCALARS = ("layer", "max_query_len", "max_seq_len")  # int32, on the host
CACHES = ("k_cache", "v_cache")  # written in place
MUTABLE = (*CACHES, "exchange")
MATRICES = ("table", "weight", "w_o", "w_gate_up", "w_down")  # in panels on the CPU when they have two dims
OUTPUTS = {
    "embedding": ("hidden", "zeros"),
    "add_rms_norm": ("y", "residual_out"),
    "take_rows": ("a_rows", "b_rows"),
    "silu_mul": ("y",),
    "linear": ("y",),
    "norm_linear": ("y", "residual_out"),
    "norm_linear_silu_mul": ("y", "residual_out"),
    "feed_forward": ("y", "residual_out"),
    "qk_norm_rope_store": ("q",),
    "paged_attention": ("out",),
    "rope_attention": ("out",),
}


class Tiled(NamedTuple):
    """An array of many rows of which few differ: row i is `values[index[i]]`."""

    values: Array
    index: Array  # [rows] int


Inputs = Mapping[str, Array | Tiled | Buffer]  # a Buffer is on the device already


class Kernels:
    """The compiled instances of one dtype on one device."""

    def __init__(
        self,
        dtype: str,
        instances: Iterable[tuple[str, Statics]],
        device: Device | None = None,
        cpu_target: str | None = None,
    ) -> None:
        """Compile, or find compiled, a graph of the (op name, static dims) in `instances`.

        `cpu_target` is as for `compiled_graph`.
        """
        self.dtype = dtype
        self.device = device or CPU()
        self.on_cpu = self.device.is_host
        self.tensor_cores = not self.on_cpu and dtype == "bfloat16"
        self.instances = list(instances)
        self._dtype = DType[dtype]
        self._ports = [_ports(name, s, self._dtype, self.on_cpu) for name, s in self.instances]
        self._session = InferenceSession(devices=[self.device])
        facts = (dtype, self.instances)
        self._compiled = compiled_graph(self._session, self.device, "kernels", __file__, facts, self._graph, cpu_target)

    @cached_property
    def _model(self) -> Model:
        return self._session.init(self._compiled)

    @cached_property
    def _idle(self) -> list[list[Buffer]]:
        """For each instance the arguments of a call without rows. What has rows all the same, a weight, is not read:
        all of them are views of one block."""
        shapes = [
            [[0 if isinstance(d, str) else d for d in shape] for _, shape in ports.values()] for ports in self._ports
        ]
        largest = max(math.prod(shape) for row in shapes for shape in row)
        block = Buffer.zeros((largest * 4,), DType.uint8, self.device)
        return [
            [
                Buffer.from_numpy(np.zeros(shape, np.int32))
                if port in SCALARS
                else block[: math.prod(shape) * dtype.size_in_bytes].view(dtype, shape)
                for (port, (dtype, _)), shape in zip(ports.items(), row, strict=True)
            ]
            for ports, row in zip(self._ports, shapes, strict=True)
        ]

    def prepare(self, name: str, shape: Statics, *inputs: Inputs) -> list[Buffer]:
        """The arguments of a call of op `name`, on the device; `shape` holds the static dims of an instance.

        Several `inputs` are for as many instances with the same static dims, which run one after the other.
        """
        at = self._indices(name, shape)[: len(inputs)]
        used = {
            i: [self.put(name, shape, port, values[port]) for port in self._ports[i]]
            for i, values in zip(at, inputs, strict=True)
        }
        return [argument for i, idle in enumerate(self._idle) for argument in used.get(i, idle)]

    def put(self, name: str, shape: Statics, port: str, values: Array | Tiled | Buffer) -> Buffer:
        """One argument of op `name`, on the device, to be given to several calls."""
        if isinstance(values, Buffer):
            return values
        dtype, _ = self._ports[self._indices(name, shape)[0]][port]
        if isinstance(values, Tiled):
            assert not self.on_cpu, "tiles are for layouts that keep a row in one piece"
            return self._upload(port, dtype, values.values, values.index)
        return self._upload(port, dtype, self._packed(port, values))

    def idle(self) -> list[Buffer]:
        """The arguments of a call that does no work at all: what a call costs by itself."""
        return [argument for arguments in self._idle for argument in arguments]

    def execute(self, arguments: list[Buffer]) -> list[Buffer]:
        """One call: every output of every instance."""
        return self._model.execute(*arguments)

    def capture(self, key: int, arguments: list[Buffer]) -> list[Buffer]:
        """Keep the launches of a call on a GPU as `key`; the buffers that every replay writes."""
        self.execute(arguments)  # once before: what a kernel does the first time is no part of it
        self.device.synchronize()
        return self._model.capture(key, *arguments)

    def replay(self, key: int, arguments: list[Buffer]) -> None:
        """Launch a captured call again; `arguments` are the same."""
        self._model.replay(key, *arguments)

    def release(self, key: int) -> None:
        """Forget a captured call; its outputs must be gone."""
        self._model.release_captured_graph(key)

    def run(self, name: str, shape: Statics, inputs: Inputs) -> Arrays:
        """The op's outputs as float32 [..], and the caches as they are afterwards; `inputs` stay as they are."""
        at = self._indices(name, shape)[0]
        arguments = self.prepare(name, shape, inputs)
        results = self.execute(arguments)
        first = sum(len(OUTPUTS[op]) for op, _ in self.instances[:at])
        outputs = {port: self._download(results[first + i]) for i, port in enumerate(OUTPUTS[name])}
        start = sum(len(ports) for ports in self._ports[:at])
        for i, port in enumerate(self._ports[at]):
            if port in CACHES:
                outputs[port] = self._plain(port, self._download(arguments[start + i]))
        return outputs

    def serves(self, name: str, shape: Statics) -> bool:
        """Whether there is an instance of op `name` for the static dims in `shape`."""
        return bool(self._indices(name, shape))

    def _indices(self, name: str, shape: Statics) -> list[int]:
        return [
            i
            for i, (op, statics) in enumerate(self.instances)
            if op == name and all(shape[key] == value for key, value in statics.items())
        ]

    def _packed(self, port: str, values: Array) -> Array:
        """From the reference's layout to the device's."""
        if self.on_cpu and port == "k_cache":
            return values.swapaxes(3, 4)
        if not (self.on_cpu and port in MATRICES and values.ndim == 2):
            return values
        rows, columns = values.shape
        step = 2 if self._dtype == DType.bfloat16 else 1  # neighbours in k that lie side by side
        padded = np.zeros((-(-rows // PANEL) * PANEL, columns), np.float32)
        padded[:rows] = values
        lanes = padded.reshape(-1, PANEL, columns // step, step)  # [panel, row, k, pair]
        return lanes.transpose(0, 2, 1, 3).reshape(-1, columns * PANEL)

    def _plain(self, port: str, values: Array) -> Array:
        """Back to the reference's layout."""
        return values.swapaxes(3, 4) if self.on_cpu and port == "k_cache" else values

    def _upload(self, port: str, dtype: DType, values: Array, index: Array | None = None) -> Buffer:
        """`values`, or the rows `index` of them; the bits are made before the rows are multiplied."""
        if port in SCALARS:
            return Buffer.from_numpy(np.array(values, np.int32))
        if dtype == DType.bfloat16:
            host = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        else:
            host = np.array(values, dtype.to_numpy(), order="C")  # a copy: caches are written
        if index is not None:
            host = host[index]
        buffer = Buffer.from_numpy(host)
        return (buffer.view(DType.bfloat16, host.shape) if dtype == DType.bfloat16 else buffer).to(self.device)

    def _download(self, buffer: Buffer) -> Array:
        host = buffer.to(CPU())
        if host.dtype == DType.bfloat16:
            bits = host.view(DType.uint16, host.shape).to_numpy()
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return host.to_numpy().copy()

    def _graph(self) -> Graph:
        device = DeviceRef.from_device(self.device)
        types: list[TensorType | BufferType] = []
        for i, ports in enumerate(self._ports):
            for port, (dtype, shape) in ports.items():
                dims = [f"{d}_{i}" if isinstance(d, str) else d for d in shape]
                kind = BufferType if port in MUTABLE else TensorType
                types.append(kind(dtype, dims, DeviceRef.CPU() if port in SCALARS else device))
        with Graph("kernels", input_types=types, custom_extensions=[_call.kernels_path()]) as graph:
            inputs = iter(graph.inputs)
            results: list[TensorValue] = []
            for (name, statics), ports in zip(self.instances, self._ports, strict=True):
                values = {p: v.buffer if p in MUTABLE else v.tensor for p, v in zip(ports, inputs, strict=False)}
                placed = _place(name, statics, values)
                assert len(placed) == len(OUTPUTS[name])
                results += placed
            graph.output(*results)
        return graph


def _ports(name: str, s: Statics, dtype: DType, on_cpu: bool) -> dict[str, Port]:
    """The inputs of an instance, in order."""
    i32, f32 = DType.int32, DType.float32
    if name == "embedding":
        return {"token_ids": (i32, ("T",)), "table": (dtype, ("V", s["H"] * PANEL if on_cpu else s["H"]))}
    if name == "add_rms_norm":
        hidden = s["H"]
        return {"x": (dtype, ("T", hidden)), "residual": (dtype, ("T", hidden)), "weight": (dtype, (hidden,))}
    if name == "take_rows":
        return {"a": (dtype, ("T", s["A"])), "b": (dtype, ("T", s["H"])), "rows": (i32, ("R",))}
    if name == "silu_mul":
        return {"gate_up": (dtype, ("T", 2 * s["I"]))}
    if name == "linear":
        bias: dict[str, Port] = {"bias": (dtype, (s["N"],))} if s["bias"] else {}
        weight = tuple(linear_weight_shape(s["N"], s["K"], on_cpu))
        return {"x": (dtype, ("M", s["K"])), "weight": (dtype, weight), **bias}
    if name in ("norm_linear", "norm_linear_silu_mul"):
        rows = s["N"] if name == "norm_linear" else 2 * s["I"]
        row: Port = (dtype, ("T", s["H"]))
        weight = tuple(linear_weight_shape(rows, s["H"], on_cpu))
        bias = {"bias": (dtype, (rows,))} if s.get("bias") else {}
        return {"x": row, "residual": row, "gain": (dtype, (s["H"],)), "weight": (dtype, weight), **bias}
    if name == "feed_forward":
        hidden, width = s["H"], s["I"]
        matrices = {"w_o": (hidden, s["Q"]), "w_gate_up": (2 * width, hidden), "w_down": (hidden, width)}
        return {
            "attended": (dtype, ("T", s["Q"])),
            "residual": (dtype, ("T", hidden)),
            "gain": (dtype, (hidden,)),
            **{port: (dtype, tuple(linear_weight_shape(*shape, on_cpu))) for port, shape in matrices.items()},
            "exchange": (DType.uint64, tuple(exchange_shape(hidden, width))),
        }
    k_shape, v_shape = kv_cache_shapes(LAYERS, "pages", s["Hkv"], s.get("S", "S"), s["D"], on_cpu)
    cache: dict[str, Port] = {
        "k_cache": (dtype, tuple(k_shape)),
        "v_cache": (dtype, tuple(v_shape)),
        "layer": (i32, ()),
    }
    head: Port = (dtype, (s["D"],))
    row: Port = (i32, ("T",))
    projections: dict[str, Port] = {
        "qkv": (dtype, ("T", (s["Hq"] + 2 * s["Hkv"]) * s["D"])),
        "q_norm": head,
        "k_norm": head,
        "cos_sin": (f32, ("M", s["D"])),
        "positions": row,
        "slots": row,
    }
    requests: dict[str, Port] = {
        "page_table": (i32, ("B", "P")),
        "query_starts": (i32, ("B_plus_1",)),
        "seq_lens": (i32, ("B",)),
        "max_query_len": (i32, ()),
        "max_seq_len": (i32, ()),
    }
    if name == "qk_norm_rope_store":
        return {**projections, **cache}
    if name == "rope_attention":
        return {**projections, **cache, **requests}
    assert name == "paged_attention", name
    return {"q": (dtype, ("T", s["Hq"] * s["D"])), **cache, **requests}


def _place(name: str, s: Statics, x: dict[str, Any]) -> list[TensorValue]:
    """Place one instance in the graph under construction."""
    way: dict[str, bool] = {"batch_invariant": s.get("batch_invariant", False)}
    if name == "linear":
        out = DType.float32 if s["wide"] else None
        return [linear(x["x"], x["weight"], s["N"], x.get("bias"), out, **way)]
    if "k_cache" in x:
        cache = CacheView(x["k_cache"], x["v_cache"], x["layer"])
        x = {name: value for name, value in x.items() if name not in ("k_cache", "v_cache", "layer")} | {"cache": cache}
    calls: dict[str, Callable[[], Any]] = {
        "embedding": lambda: embedding(**x, hidden_size=s["H"]),
        "add_rms_norm": lambda: add_rms_norm(**x, eps=EPS),
        "take_rows": lambda: take_rows(**x),
        "silu_mul": lambda: silu_mul(**x),
        "norm_linear": lambda: norm_linear(**x, out_features=s["N"], eps=EPS, **way),
        "norm_linear_silu_mul": lambda: norm_linear_silu_mul(**x, width=s["I"], eps=EPS, **way),
        "feed_forward": lambda: feed_forward(**x, width=s["I"], eps=EPS, **way),
        "qk_norm_rope_store": lambda: qk_norm_rope_store(**x, eps=EPS),
        "paged_attention": lambda: paged_attention(**x, scale=s["D"] ** -0.5, **way),
        "rope_attention": lambda: rope_attention(**x, eps=EPS, scale=s["D"] ** -0.5, **way),
    }
    placed = calls[name]()
    return [placed] if isinstance(placed, TensorValue) else list(placed)
