"""What mili's kernels should compute, written once and run in two arithmetics.

`exact(dtype)` computes in float64: the reference. `naive(dtype)` computes in the kernel's own dtype as plain framework
code would, one elementary step after the other, each result rounded: the error that a kernel's is measured against.
Knows no devices and no packed layouts: a weight is [N, K], a cache is [L, pages, Hkv, S, D] for keys and values alike,
bfloat16 values are float32 numbers that bfloat16 can hold. Invariant: nothing here is taken from mili.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]


def round_to(dtype: str, values: Array) -> Array:
    """float32 values rounded to the nearest, ties to even, that `dtype` can hold; NaN stays NaN."""
    single = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return single
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(single), np.float32(np.nan), rounded.view(np.float32))


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How numbers are held, how a step's result is rounded, and how a sum of products is formed."""

    hold: type[np.floating[Any]]
    round: Callable[[Array], Array]
    store: Callable[[Array], Array]  # a rounding that belongs to what the kernel computes, hence in every arithmetic
    dot: Callable[[Array, Array], Array]  # [.., M, K], [.., N, K] -> [.., M, N], not yet rounded
    sum: Callable[[Array], Array]  # [.., N] -> [.., 1], not yet rounded

    def __call__(self, values: Array) -> Array:
        return values.astype(self.hold)


def _exact_dot(a: Array, b: Array) -> Array:
    return a @ b.swapaxes(-1, -2)


def _exact_sum(x: Array) -> Array:
    return x.sum(axis=-1, keepdims=True)


def _sequential_sum(x: Array) -> Array:
    return np.cumsum(x, axis=-1, dtype=np.float32)[..., -1:]


def _sequential_dot(a: Array, b: Array) -> Array:
    """One product after the other in float32, as a plain loop over k does."""
    total = np.zeros((*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-2]), np.float32)
    product = np.empty_like(total)
    columns = np.ascontiguousarray(np.moveaxis(b, -1, 0))  # [K, .., N]
    for k in range(a.shape[-1]):
        np.multiply(a[..., k, None], columns[k][..., None, :], out=product)
        total += product
    return total


def exact(dtype: str) -> Arithmetic:
    """float64; only `store` knows `dtype`."""
    return Arithmetic(np.float64, lambda x: x, lambda x: round_to(dtype, x).astype(np.float64), _exact_dot, _exact_sum)


def naive(dtype: str) -> Arithmetic:
    """Plain same-dtype code: sums in float32, term after term, each step's result rounded to `dtype`."""

    def rounded(x: Array) -> Array:
        return round_to(dtype, x)

    return Arithmetic(np.float32, rounded, rounded, _sequential_dot, _sequential_sum)


def rms_norm(a: Arithmetic, x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; the division in float32, as transformers does it."""
    x = a(x)
    mean = a.sum(x * x) / a.hold(x.shape[-1])
    return a.round(a.round(x / np.sqrt(mean + a.hold(eps))) * a(weight))


def silu(a: Arithmetic, x: Array) -> Array:
    """x / (1 + exp(-x))."""
    x = a(x)
    with np.errstate(over="ignore"):
        return a.round(x / (1 + np.exp(-x)))


def rope(a: Arithmetic, x: Array, angles: Array) -> Array:
    """Rotate the pairs (i, i + D/2) of x [T, heads, D] by angles [T, D]: cosines, then sines."""
    half = x.shape[-1] // 2
    cos, sin = a(angles[:, None, :half]), a(angles[:, None, half:])
    low, high = x[..., :half], x[..., half:]
    rotated = [a.round(low * cos) - a.round(high * sin), a.round(high * cos) + a.round(low * sin)]
    return a.round(np.concatenate(rotated, axis=-1))


def softmax(a: Arithmetic, scores: Array) -> Array:
    """Over the last axis; in float32 and rounded once, as transformers does it."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return a.round(weights / a.sum(weights))


def gather(cache: Array, pages: Array, length: int) -> Array:
    """The first `length` tokens of a request as [Hkv, length, D], from one layer of a cache [pages, Hkv, S, D]."""
    page_size = cache.shape[2]
    rows = cache[pages[: -(-length // page_size)]]  # [p, Hkv, S, D]
    return np.concatenate(list(rows), axis=1)[:, :length]


def attention(a: Arithmetic, q: Array, k: Array, v: Array, first_position: int, scale: float) -> Array:
    """Causal attention of q [rows, Hq, D] over k, v [Hkv, tokens, D]; row i sits at `first_position` + i."""
    rows, heads, head_dim = q.shape
    kv_heads, tokens, _ = k.shape
    group = heads // kv_heads
    grouped = a(q).reshape(rows, kv_heads, group, head_dim).transpose(1, 2, 0, 3)  # [Hkv, G, rows, D]
    k, v = a(k)[:, None], a(v)[:, None]  # [Hkv, 1, tokens, D]
    scores = a.round(a.round(a.dot(grouped, k)) * a.hold(scale))
    position = first_position + np.arange(rows)[:, None]  # [rows, 1]
    scores = np.where(np.arange(tokens) <= position, scores, -np.inf)
    out = a.round(a.dot(softmax(a, scores), v.swapaxes(-1, -2)))  # [Hkv, G, rows, D]
    return out.transpose(2, 0, 1, 3).reshape(rows, heads, head_dim)


def paged_attention(a: Arithmetic, x: Arrays, head_dim: int, scale: float) -> Array:
    """`attention` of every request of a ragged batch: q [T, Hq * D] and the arrays of `mili.paged_attention`."""
    q, layer = x["q"], int(x["layer"])
    out = np.zeros(q.shape, a.hold)
    for b, (start, end) in enumerate(zip(x["query_starts"][:-1], x["query_starts"][1:], strict=True)):
        length = int(x["seq_lens"][b])
        k, v = (gather(x[name][layer], x["page_table"][b], length) for name in ("k_cache", "v_cache"))
        rows = q[start:end].reshape(end - start, -1, head_dim)
        out[start:end] = attention(a, rows, k, v, length - (end - start), scale).reshape(end - start, -1)
    return out


def qk_norm_rope_store(a: Arithmetic, x: Arrays, eps: float) -> Arrays:
    """q [T, Hq * D] and the caches after the step; v is copied, untouched slots keep their bits."""
    tokens, head_dim = x["qkv"].shape[0], x["q_norm"].shape[0]
    kv_heads, page_size = x["v_cache"].shape[2:4]
    num_q = x["qkv"].shape[1] // head_dim - 2 * kv_heads
    heads = x["qkv"].reshape(tokens, num_q + 2 * kv_heads, head_dim)
    angles = x["cos_sin"][x["positions"]]  # [T, D]
    q = rope(a, rms_norm(a, heads[:, :num_q], x["q_norm"], eps), angles)
    k = rope(a, rms_norm(a, heads[:, num_q:-kv_heads], x["k_norm"], eps), angles)
    caches = {"k_cache": a(x["k_cache"]), "v_cache": a(x["v_cache"])}
    page, offset = x["slots"] // page_size, x["slots"] % page_size
    for name, values in (("k_cache", k), ("v_cache", a(heads[:, -kv_heads:]))):
        caches[name][int(x["layer"]), page, :, offset] = values
    return {"q": q.reshape(tokens, num_q * head_dim), **caches}
