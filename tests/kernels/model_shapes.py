"""The kernels at the shapes of real models, for a GPU: which instances, which batches, and a reference that keeps up.

`CASES` has an entry for each op of the network's step on a GPU; a new op is a new entry. Batches are odd (1, 3, 7, 65,
255) and contexts go from 1 to 32,768 tokens. A product of 255 rows with a weight of 262 million elements has no
reference in float64 and in naive steps that a test could wait for, so its rows are copies of few different ones, in
random order: the reference computes the different ones, and every element of the output is still compared. Knows
shapes; the ops' mathematics are those of `kernels.specs`. Invariant: equal seeds give equal inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.inputs import Shape
from kernels.specs import BY_NAME
from support.kernels import Kernels, Tiled
from support.reference import Array, Arrays, exact, naive

BATCHES = (1, 3, 7, 65, 255)
PAGE_SIZE = 16
VOCAB = 151_936
# Widths that end within the widest tile, which 530 rows get, and within 16 bytes of it.
GATED_EDGES: tuple[Shape, ...] = ({"H": 64, "I": 2888}, {"H": 64, "I": 2884})


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def attention(self) -> Shape:
        return {"Hq": self.heads, "Hkv": self.kv_heads, "D": self.head_dim, "S": PAGE_SIZE}


MODELS = {
    "0.6B": Model(1024, 3072, 16, 8),
    "4B": Model(2560, 9728, 32, 8),
    "8B": Model(4096, 12288, 32, 8),
    "32B": Model(5120, 25600, 64, 8),
}


@dataclass(frozen=True, slots=True)
class Case:
    """The instances of one op that a model has, and the batches each is called with.

    `tiles` says which dims have few different rows, and how many; `rows` which of them an array's first dims are. A dim
    of twice the length, gate and up, is written "2I".
    """

    name: str
    statics: Callable[[Model], list[Shape]]
    batches: Callable[[Shape], list[Shape]]
    tiles: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _linear(model: Model) -> list[Shape]:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    sizes = (
        (model.hidden, q + 2 * kv),
        (q, model.hidden),
        (model.hidden, 2 * model.inter),
        (model.inter, model.hidden),
    )
    head = {"K": model.hidden, "N": VOCAB, "bias": False, "wide": True}
    return [*({"K": k, "N": n, "bias": False, "wide": False} for k, n in sizes), head]


def _rows(dim: str, **others: int) -> Callable[[Shape], list[Shape]]:
    return lambda static: [{dim: rows, **others} for rows in BATCHES]


def _decode(batch: int) -> tuple[tuple[int, int], ...]:
    """One row each, contexts around the borders of pages and tiles; one of them is long."""
    lengths = [(1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 511, 513)[i % 13] + i for i in range(batch - 1)]
    return tuple((length, 1) for length in (32_768 if batch < 65 else 4097, *lengths))


def _attention(static: Shape) -> list[Shape]:
    contexts = [((length, 1),) for length in (1, 16, 17, 512, 1000, 4096)]
    prompts = [((1, 1), (65, 65), (7, 7)), ((255, 255),), ((2048, 65), (1, 1), (300, 3)), ((32_768, 3), (129, 64))]
    return [{"requests": requests} for requests in (*contexts, *map(_decode, BATCHES), *prompts)]


CASES = (
    Case("embedding", lambda m: [{"H": m.hidden}], _rows("T", V=1003)),
    Case("add_rms_norm", lambda m: [{"H": m.hidden}], _rows("T")),
    Case(
        "take_rows",
        lambda m: [{"A": m.heads * m.head_dim, "H": m.hidden}],
        lambda s: [{"T": 300, "R": rows} for rows in BATCHES],
    ),
    Case("silu_mul", lambda m: [{"I": m.inter}], _rows("T")),
    Case(
        "norm_linear",
        lambda m: [{"H": m.hidden, "N": (m.heads + 2 * m.kv_heads) * m.head_dim, "bias": False}],
        lambda s: [{"T": rows} for rows in (*BATCHES, 8, 9, 530)],
        {"T": 6, "N": 96},
        {"x": ("T",), "residual": ("T",), "weight": ("N",), "bias": ("N",), "y": ("T", "N"), "residual_out": ("T",)},
    ),
    Case(
        "norm_linear_silu_mul",
        lambda m: [{"H": m.hidden, "I": m.inter}, *GATED_EDGES],
        lambda s: [{"T": rows} for rows in (*BATCHES, 8, 9, 530)],
        {"T": 6, "I": 48},
        {"x": ("T",), "residual": ("T",), "weight": ("2I",), "y": ("T", "I"), "residual_out": ("T",)},
    ),
    Case(  # larger weights go the ways of the three ops above
        "feed_forward",
        lambda m: [{"Q": m.heads * m.head_dim, "H": m.hidden, "I": m.inter}] if m.hidden == 1024 else [],
        lambda s: [{"T": rows} for rows in (1, 2, 3, 4, 5)],
    ),
    Case("qk_norm_rope_store", lambda m: [m.attention], _rows("T")),
    Case("paged_attention", lambda m: [m.attention], _attention),
    Case("rope_attention", lambda m: [m.attention], _attention),
    Case(
        "linear",
        _linear,
        lambda s: [{"M": rows} for rows in ((*BATCHES, 530, 1030) if s["N"] < VOCAB else (1, 7, 65))],
        {"M": 6, "N": 96},
        {"x": ("M",), "weight": ("N",), "bias": ("N",), "y": ("M", "N")},
    ),
)


def model_instances() -> list[tuple[str, Shape]]:
    """(op, static dims) of every instance of all models, each once."""
    found = [(case.name, static) for case in CASES for model in MODELS.values() for static in case.statics(model)]
    return [item for i, item in enumerate(found) if item not in found[:i]]


def check(kernels: Kernels, case: Case, model: Model, seed: int = 0) -> Iterator[str]:
    """What is wrong with the op at this model's shapes, one line each; nothing if all is well."""
    for static in case.statics(model):
        held: dict[str, Any] = {}  # weights, on the device, for all batches of an instance
        for number, batch in enumerate(case.batches(static)):
            shape = {**static, **batch}
            few = {**shape, **case.tiles}
            inputs = BY_NAME[case.name].inputs(
                np.random.default_rng([seed, 0 if case.tiles else number]), few, kernels.dtype
            )
            index = row_index(case, shape, seed)
            given: dict[str, Any] = dict(inputs)
            for port in inputs.keys() & case.rows.keys():
                (dim,) = case.rows[port]
                given[port] = Tiled(inputs[port], index[dim])
                if dim.removeprefix("2") in static:
                    given[port] = held[port] = held.get(port) or kernels.put(case.name, shape, port, given[port])
            outputs = kernels.run(case.name, shape, given)
            found = differences(case, few, index, inputs, outputs, kernels.dtype, kernels.tensor_cores)
            yield from (f"{shape}: {what}" for what in found)


def tiled(case: Case, inputs: Arrays, index: Mapping[str, Array]) -> dict[str, Any]:
    """A call's inputs, with the few rows in all their places."""
    rows = {port: Tiled(inputs[port], index[case.rows[port][0]]) for port in inputs.keys() & case.rows.keys()}
    return {**inputs, **rows}


def row_index(case: Case, shape: Shape, seed: int) -> dict[str, Array]:
    """For each tiled dim, and for "2" of it, which of the few rows stands in each place."""
    index = {}
    for dim, few in case.tiles.items():
        index[dim] = np.random.default_rng([seed, shape[dim]]).integers(0, few, shape[dim])
        index[f"2{dim}"] = np.concatenate([index[dim], few + index[dim]])
    return index


def differences(
    case: Case,
    few: Shape,
    index: Mapping[str, Array],
    inputs: Arrays,
    outputs: Arrays,
    dtype: str,
    tensor_cores: bool = False,
) -> list[str]:
    """`KernelSpec.violations`, of the results of few different rows in all their places."""
    spec = BY_NAME[case.name]

    def placed(results: Arrays) -> Arrays:
        for name, dims in case.rows.items():
            for axis, dim in enumerate(dims):
                if name in results:
                    results[name] = results[name].take(index[dim], axis)
        return results

    true, plain = (placed(spec.compute(a, inputs, few)) for a in (exact(dtype), naive(dtype)))
    return spec.differences(outputs, true, plain, spec.slack(few) if tensor_cores else 0.0)
