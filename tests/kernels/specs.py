"""One `KernelSpec` for each kernel: what it computes, on which inputs and shapes, and what it costs.

Tests, the benchmark and the planted bugs all read these objects. Pass rule (`violations`): inputs are rounded to the
dtype first; outputs that only copy or round once must equal the naive ones bit by bit; for the others

    error(kernel) <= 2 * error(naive) + 2^-23

where error is the relative L2 distance from the float64 reference, the worst row's when rows have 32 elements or more
(a wrong row cannot hide among good ones) and that of the whole output otherwise (a short row's rounding is luck). A
GPU's tensor cores add in float32 but cut off where others round; a sum of n such additions may be off by n 2^-25 more.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from kernels.inputs import (
    Shape,
    attention_inputs,
    embedding_inputs,
    feed_forward_inputs,
    linear_inputs,
    norm_inputs,
    norm_linear_inputs,
    rope_attention_inputs,
    silu_mul_inputs,
    store_inputs,
    take_rows_inputs,
)
from support.reference import (
    Arithmetic,
    Array,
    Arrays,
    exact,
    naive,
    paged_attention,
    qk_norm_rope_store,
    rms_norm,
    silu,
)

EPS = 1e-6
DTYPES = ("float32", "bfloat16")
HEADS = tuple(
    {"Hq": q, "Hkv": kv, "D": d} for q, kv, d in ((16, 8, 128), (4, 1, 64), (8, 1, 64), (2, 2, 64), (4, 2, 128))
)
PAGE_SIZES = (1, 2, 16, 64)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """`statics` fix an instance of the op in the graph; `grid` holds the dims that only a call fixes."""

    name: str
    statics: tuple[Shape, ...]
    grid: tuple[Shape, ...]
    inputs: Callable[[Generator, Shape, str], Arrays]
    compute: Callable[[Arithmetic, Arrays, Shape], Arrays]
    bytes_moved: Callable[[Shape, int], int]  # of a shape and an element's size, as in the kernel's header
    flops: Callable[[Shape], int]
    exact: frozenset[str] = frozenset()
    depth: Callable[[Shape], int] = lambda s: 0  # products in the longest sum that a tensor core may form

    def shapes(self) -> list[Shape]:
        """Every instance with every entry of the grid."""
        return [{**static, **dynamic} for static in self.statics for dynamic in self.grid]

    def violations(
        self, inputs: Arrays, outputs: Arrays, shape: Shape, dtype: str, tensor_cores: bool = False
    ) -> list[str]:
        """What is wrong with `outputs`, one line each; empty when they pass."""
        true, plain = (self.compute(a, inputs, shape) for a in (exact(dtype), naive(dtype)))
        return self.differences(outputs, true, plain, self.slack(shape) if tensor_cores else 0.0)

    def slack(self, shape: Shape) -> float:
        """What tensor cores, which add 16 products at a time, may lose by cutting off."""
        return -(-self.depth(shape) // 16) * 2.0**-25

    def differences(self, outputs: Arrays, true: Arrays, plain: Arrays, slack: float = 0.0) -> list[str]:
        """`violations`, of outputs of which the exact and the naive ones are known."""
        assert set(outputs) == set(true), f"{self.name} returned {sorted(outputs)}, expected {sorted(true)}"
        found = []
        for name, got in outputs.items():
            if got.shape != true[name].shape:
                found.append(f"{name}: shape {got.shape}, expected {true[name].shape}")
            elif name in self.exact:
                if not same_bits(got, plain[name]):
                    found.append(f"{name}: differs, expected the very bits")
            elif not np.array_equal(np.isnan(got), np.isnan(true[name])):
                found.append(f"{name}: NaN where none is expected, or none where one is")
            else:
                limit = 2 * error(plain[name], true[name]) + 2.0**-23 + slack
                if (have := error(got, true[name])) > limit:
                    found.append(f"{name}: error {have:.3g} above {limit:.3g}")
        return found


def error(values: Array, exact: Array) -> float:
    """Relative L2 distance, of the worst row or of the whole; NaN must sit in the same places and is left out."""
    if values.size == 0:
        return 0.0
    width = exact.shape[-1] if exact.shape[-1] >= 32 else exact.size
    reference = np.nan_to_num(exact.astype(np.float64)).reshape(-1, width)
    difference = np.linalg.norm(np.nan_to_num(values.astype(np.float64)).reshape(-1, width) - reference, axis=1)
    norm = np.linalg.norm(reference, axis=1)
    return float((difference / np.where(norm == 0, 1, norm)).max())


def same_bits(a: Array, b: Array) -> bool:
    """Equal as float32 bit patterns, so that NaN equals NaN and 0 is not -0."""
    a, b = (np.ascontiguousarray(x, np.float32).view(np.uint32) for x in (a, b))
    return np.array_equal(a, b)


def _embedding(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    hidden = a(x["table"][x["token_ids"]])
    return {"hidden": hidden, "zeros": np.zeros_like(hidden)}


def _add_rms_norm(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    total = a.store(x["x"] + x["residual"])  # y belongs to the rounded sum that the next layer sees
    return {"y": rms_norm(a, total, x["weight"], EPS), "residual_out": total}


def _take_rows(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    return {"a_rows": a(x["a"])[x["rows"]], "b_rows": a(x["b"])[x["rows"]]}


def _silu_mul(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    gate, up = x["gate_up"][:, : s["I"]], x["gate_up"][:, s["I"] :]
    return {"y": a.round(silu(a, gate) * a(up))}


def _linear(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    y = a.dot(a(x["x"]), a(x["weight"]))
    y = y if s["wide"] else a.round(y)
    if s["bias"]:
        y = y + a(x["bias"])
    return {"y": y if s["wide"] else a.round(y)}


def _norm(a: Arithmetic, x: Arrays) -> tuple[Array, Array]:
    """The rounded sum of x and residual, and its norm as the product behind it reads it."""
    total = a.store(x["x"] + x["residual"])
    return total, rms_norm(a, total, x["gain"], EPS)


def _norm_linear(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    total, normed = _norm(a, x)
    y = a.round(a.dot(normed, a(x["weight"])))
    return {"y": a.round(y + a(x["bias"])) if s["bias"] else y, "residual_out": total}


def _norm_linear_silu_mul(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    total, normed = _norm(a, x)
    gate, up = (a.round(a.dot(normed, a(w))) for w in np.split(x["weight"], 2))
    return {"y": a.round(silu(a, gate) * up), "residual_out": total}


def _feed_forward(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    projected = a.round(a.dot(a(x["attended"]), a(x["w_o"])))
    total = a.round(projected + a(x["residual"]))
    normed = rms_norm(a, total, x["gain"], EPS)
    gate, up = (a.round(a.dot(normed, a(w))) for w in np.split(x["w_gate_up"], 2))
    return {"y": a.round(a.dot(a.round(silu(a, gate) * up), a(x["w_down"]))), "residual_out": total}


def _store(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    return qk_norm_rope_store(a, x, EPS)


def _attention(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    out = paged_attention(a, x, s["D"], s["D"] ** -0.5)
    return {"out": out, "k_cache": a(x["k_cache"]), "v_cache": a(x["v_cache"])}


def _rope_attention(a: Arithmetic, x: Arrays, s: Shape) -> Arrays:
    made = _store(a, x, s)
    at = int(x["layer"]), x["slots"] // s["S"], slice(None), x["slots"] % s["S"]
    stored = {"q": a.store(made["q"])}  # q and k are rounded before they meet
    for name in ("k_cache", "v_cache"):  # all but the new slots is rounded already
        stored[name] = x[name].copy()
        stored[name][at] = a.store(made[name][at])
    return _attention(a, {**x, **stored}, s)


def _keys_seen(requests: tuple[tuple[int, int], ...]) -> int:
    """Sum over rows of (position + 1)."""
    return sum(rows * length - rows * (rows - 1) // 2 for length, rows in requests)


def _attention_bytes(s: Shape, size: int) -> int:
    tokens, cached = sum(rows for _, rows in s["requests"]), sum(length for length, _ in s["requests"])
    return size * (2 * tokens * s["Hq"] * s["D"] + 2 * s["Hkv"] * s["D"] * cached)


def _requests(page_size: int) -> tuple[tuple[int, int], ...]:
    """Decode, prefill and chunks, at the borders of a page, a tile of 64 keys, a chunk of 512 and 32 query rows."""
    around = ((max(page_size - 1, 1),) * 2, (page_size, 1), (page_size + 1, page_size + 1))
    return (*around, (1, 1), (33, 33), (63, 5), (64, 32), (65, 2), (512, 1), (513, 3), (512 + page_size, 34), (1100, 1))


def _linear_static(k: int, n: int, bias: bool = False, wide: bool = False) -> Shape:
    return {"K": k, "N": n, "bias": bias, "wide": wide}


_TOKENS = tuple({"T": tokens} for tokens in (0, 1, 15, 16, 17))
_FEW_TOKENS = tuple({"T": tokens} for tokens in (0, 1, 2, 8, 9, 17, 40))  # a GPU streams the weight up to 8
# A GPU copies 64 or 128 of k by 64 rows of w at a time, of few rows; 448 and 136 are whole numbers of neither.
_SHAPES = ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (448, 136), (3328, 52), (66, 101), (2, 1))
_LINEAR = (
    *(_linear_static(k, n) for k, n in _SHAPES),
    *(_linear_static(k, n, bias=True) for k, n in ((1024, 96), (66, 101))),
    *(_linear_static(k, n, wide=True) for k, n in ((1024, 1003), (34, 33))),  # logits over an odd vocabulary
)

SPECS = (
    KernelSpec(
        "embedding",
        ({"H": 1024}, {"H": 34}),
        tuple({"T": tokens, "V": v} for tokens, v in ((0, 5), (1, 1), (15, 33), (17, 64), (16, 1003))),
        embedding_inputs,
        _embedding,
        lambda s, size: 3 * s["T"] * s["H"] * size,
        lambda s: 0,
        frozenset({"hidden", "zeros"}),
    ),
    KernelSpec(
        "add_rms_norm",
        ({"H": 1024}, {"H": 2560}, {"H": 8200}, {"H": 95}, {"H": 1}),  # the GPU divides these rows differently
        (*_TOKENS, {"T": 130}),
        norm_inputs,
        _add_rms_norm,
        lambda s, size: 4 * s["T"] * s["H"] * size,
        lambda s: 5 * s["T"] * s["H"],
        frozenset({"residual_out"}),
    ),
    KernelSpec(
        "take_rows",
        ({"A": 2048, "H": 1024}, {"A": 64, "H": 95}, {"A": 3, "H": 16}),
        tuple({"T": tokens, "R": rows} for tokens, rows in ((1, 0), (1, 1), (17, 3), (5, 16))),
        take_rows_inputs,
        _take_rows,
        lambda s, size: 2 * s["R"] * (s["A"] + s["H"]) * size,
        lambda s: 0,
        frozenset({"a_rows", "b_rows"}),
    ),
    KernelSpec(
        "silu_mul",
        ({"I": 3072}, {"I": 45}, {"I": 1}),
        _TOKENS,
        silu_mul_inputs,
        _silu_mul,
        lambda s, size: 3 * s["T"] * s["I"] * size,
        lambda s: 5 * s["T"] * s["I"],
    ),
    KernelSpec(
        "linear",
        _LINEAR,
        tuple({"M": rows} for rows in (0, 1, 2, 11, 12, 13, 25, 70)),
        linear_inputs,
        _linear,
        lambda s, size: (s["N"] + s["M"]) * s["K"] * size + s["M"] * s["N"] * (4 if s["wide"] else size),
        lambda s: 2 * s["M"] * s["N"] * s["K"],
        depth=lambda s: s["K"],
    ),
    KernelSpec(
        "norm_linear",
        (
            *({"H": hidden, "N": n, "bias": False} for hidden, n in ((1024, 512), (66, 101))),
            *({"H": hidden, "N": n, "bias": True} for hidden, n in ((64, 33), (768, 72))),
        ),
        _FEW_TOKENS,
        norm_linear_inputs,
        _norm_linear,
        lambda s, size: (s["N"] * s["H"] + s["T"] * (3 * s["H"] + s["N"])) * size,
        lambda s: 2 * s["T"] * s["N"] * s["H"],
        frozenset({"residual_out"}),
    ),
    KernelSpec(
        "norm_linear_silu_mul",
        tuple({"H": hidden, "I": inter} for hidden, inter in ((1024, 384), (448, 136), (66, 45), (64, 20), (256, 28))),
        _FEW_TOKENS,
        norm_linear_inputs,
        _norm_linear_silu_mul,
        lambda s, size: (2 * s["I"] * s["H"] + s["T"] * (3 * s["H"] + s["I"])) * size,
        lambda s: 4 * s["T"] * s["I"] * s["H"],
        frozenset({"residual_out"}),
    ),
    KernelSpec(
        "feed_forward",
        ({"Q": 2048, "H": 1024, "I": 3072}, {"Q": 128, "H": 64, "I": 46}),  # the first in one kernel on a GPU
        tuple({"T": tokens} for tokens in (0, 1, 2, 3, 4, 5, 17)),
        feed_forward_inputs,
        _feed_forward,
        lambda s, size: ((s["Q"] + 3 * s["I"]) * s["H"] + s["T"] * (s["Q"] + 3 * s["H"])) * size,
        lambda s: 2 * s["T"] * (s["Q"] + 3 * s["I"]) * s["H"],
    ),
    KernelSpec(
        "qk_norm_rope_store",
        HEADS,
        (
            *({"T": tokens, "S": s} for s in PAGE_SIZES for tokens in sorted({0, 1, s - 1, s, s + 1})),
            {"T": 800, "S": 16},  # many tokens: another GPU kernel
        ),
        store_inputs,
        _store,
        lambda s, size: s["T"] * (2 * s["Hq"] + 4 * s["Hkv"]) * s["D"] * size + 4 * s["T"] * s["D"],
        lambda s: 8 * s["T"] * (s["Hq"] + s["Hkv"]) * s["D"],
        frozenset({"v_cache"}),
    ),
    KernelSpec(
        "paged_attention",
        HEADS,
        ({"S": 16, "requests": ()}, *({"S": s, "requests": _requests(s)} for s in PAGE_SIZES)),
        attention_inputs,
        _attention,
        _attention_bytes,
        lambda s: 4 * s["Hq"] * s["D"] * _keys_seen(s["requests"]),
        frozenset({"k_cache", "v_cache"}),
    ),
    KernelSpec(
        "rope_attention",
        HEADS,
        (
            {"S": 16, "requests": ()},
            *({"S": s, "requests": _requests(s)} for s in PAGE_SIZES),
            *({"S": s, "requests": tuple((length, 1) for length, _ in _requests(s))} for s in PAGE_SIZES),
        ),
        rope_attention_inputs,
        _rope_attention,
        lambda s, size: (
            _attention_bytes(s, size) + 4 * size * sum(rows for _, rows in s["requests"]) * s["Hkv"] * s["D"]
        ),
        lambda s: 4 * s["Hq"] * s["D"] * _keys_seen(s["requests"]),
        frozenset({"v_cache"}),
    ),
)
BY_NAME = {spec.name: spec for spec in SPECS}


def instances(page_size: int | None = None) -> list[tuple[str, Shape]]:
    """(op, static dims) of every instance; the page size is a static dim if it is given, as the GPU kernels need it."""
    paged = {} if page_size is None else {"S": page_size}
    return [
        (spec.name, {**static, **(paged if "S" in spec.grid[0] else {})}) for spec in SPECS for static in spec.statics
    ]
