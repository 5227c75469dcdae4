"""Random inputs of each kernel, in the reference's plain layouts and already rounded to the kernel's dtype.

Values are drawn to make mistakes visible: norms small enough for eps to count, gates that overflow exp, pages in random
order, and NaN wherever a kernel must not look. Invariant: equal generator state, shape and dtype give equal arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.random import Generator

from mili.ops.feed_forward import exchange_shape
from support.reference import Array, Arrays, round_to

Shape = Mapping[str, Any]  # dims by their letter; `requests` is a tuple of (seq_len, query_len)

LAYERS, LAYER = 2, 1  # the caches' layers, and the one that kernels are asked to use


def normal(rng: Generator, dtype: str, *shape: int) -> Array:
    """Standard normal values of `dtype`."""
    return round_to(dtype, rng.standard_normal(shape, np.float32))


def row_scales(rng: Generator, rows: int, low: float, high: float) -> Array:
    """[rows, 1] factors 10^low ... 10^high."""
    return (10 ** rng.uniform(low, high, (rows, 1))).astype(np.float32)


def embedding_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    return {"token_ids": rng.integers(0, s["V"], s["T"], np.int32), "table": normal(rng, dtype, s["V"], s["H"])}


def norm_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    # Down to 1e-4, where eps is no longer small against the mean square.
    scales = row_scales(rng, s["T"], -4, 1)
    x, residual = (round_to(dtype, normal(rng, dtype, s["T"], s["H"]) * scales) for _ in range(2))
    if s["T"] > 2:
        residual[1] = -x[1]  # a sum of exactly zero
    weight = round_to(dtype, 1 + 0.5 * rng.standard_normal(s["H"]))
    return {"x": x, "residual": residual, "weight": weight}


def take_rows_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    rows = rng.integers(0, s["T"], s["R"]).astype(np.int32)
    return {"a": normal(rng, dtype, s["T"], s["A"]), "b": normal(rng, dtype, s["T"], s["H"]), "rows": rows}


def silu_mul_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    scales = row_scales(rng, s["T"], -1, 1.5)  # up to gates of about 100, where exp overflows float32
    return {"gate_up": round_to(dtype, normal(rng, dtype, s["T"], 2 * s["I"]) * scales)}


def linear_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    bias = {"bias": normal(rng, dtype, s["N"])} if s["bias"] else {}
    weight = round_to(dtype, normal(rng, dtype, s["N"], s["K"]) * s["K"] ** -0.5)
    return {"x": normal(rng, dtype, s["M"], s["K"]), "weight": weight, **bias}


def norm_linear_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    norm = norm_inputs(rng, s, dtype)
    rows = s["N"] if "N" in s else 2 * s["I"]
    weight = round_to(dtype, normal(rng, dtype, rows, s["H"]) * (2 * s["H"] ** -0.5))
    bias = {"bias": normal(rng, dtype, rows)} if s.get("bias") else {}
    return {"x": norm["x"], "residual": norm["residual"], "gain": norm["weight"], "weight": weight, **bias}


def feed_forward_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    hidden, width = s["H"], s["I"]
    scales = row_scales(rng, s["T"], -2, 1)

    def weight(rows: int, columns: int) -> Array:
        return round_to(dtype, normal(rng, dtype, rows, columns) * columns**-0.5)

    return {
        "attended": round_to(dtype, normal(rng, dtype, s["T"], s["Q"]) * scales),
        "residual": round_to(dtype, normal(rng, dtype, s["T"], hidden) * scales),
        "gain": round_to(dtype, 1 + 0.5 * rng.standard_normal(hidden)),
        "w_o": weight(hidden, s["Q"]),
        "w_gate_up": weight(2 * width, hidden),
        "w_down": weight(hidden, width),
        "exchange": np.zeros(exchange_shape(hidden, width), np.uint64),
    }


def store_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    hq, hkv, d, tokens, page_size = (s[name] for name in ("Hq", "Hkv", "D", "T", "S"))
    pages, positions = -(-tokens // page_size) + 3, 2 * tokens + 5
    angles = rng.uniform(0, 2 * np.pi, (positions, d // 2))
    cache = (LAYERS, pages, hkv, page_size, d)
    return {
        "qkv": round_to(dtype, normal(rng, dtype, tokens, (hq + 2 * hkv) * d) * row_scales(rng, tokens, -3, 1)),
        "q_norm": round_to(dtype, 1 + 0.5 * rng.standard_normal(d)),
        "k_norm": round_to(dtype, 1 + 0.5 * rng.standard_normal(d)),
        "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
        "positions": rng.permutation(positions)[:tokens].astype(np.int32),
        "slots": rng.permutation(pages * page_size)[:tokens].astype(np.int32),
        "k_cache": normal(rng, dtype, *cache),
        "v_cache": normal(rng, dtype, *cache),
        "layer": np.array(LAYER, np.int32),
    }


def attention_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    """Pages in random order; every slot that no request uses, and every other layer, holds NaN."""
    requests, page_size = s["requests"], s["S"]
    needed = [-(-length // page_size) for length, _ in requests]
    ids = rng.permutation(np.arange(1, sum(needed) + 3)).astype(np.int32)
    page_table = np.zeros((len(requests), max(needed, default=1)), np.int32)
    cache = (LAYERS, sum(needed) + 3, s["Hkv"], page_size, s["D"])
    k, v = np.full(cache, np.nan, np.float32), np.full(cache, np.nan, np.float32)
    for b, (length, _) in enumerate(requests):
        page_table[b, : needed[b]] = ids[sum(needed[:b]) : sum(needed[: b + 1])]
        full, rest = divmod(length, page_size)
        whole = normal(rng, dtype, full, 2, s["Hkv"], page_size, s["D"])
        k[LAYER, page_table[b, :full]], v[LAYER, page_table[b, :full]] = whole[:, 0], whole[:, 1]
        if rest:
            for values in (k, v):
                values[LAYER, page_table[b, full], :, :rest] = normal(rng, dtype, s["Hkv"], rest, s["D"])
    rows = [query_len for _, query_len in requests]
    return {
        "q": round_to(dtype, normal(rng, dtype, sum(rows), s["Hq"] * s["D"]) * row_scales(rng, sum(rows), -1, 0.3)),
        "k_cache": k,
        "v_cache": v,
        "page_table": page_table,
        "query_starts": np.cumsum([0, *rows]).astype(np.int32),
        "seq_lens": np.array([length for length, _ in requests], np.int32),
        "layer": np.array(LAYER, np.int32),
        "max_query_len": np.array(max(rows, default=0), np.int32),
        "max_seq_len": np.array(max((length for length, _ in requests), default=0), np.int32),
    }


def rope_attention_inputs(rng: Generator, s: Shape, dtype: str) -> Arrays:
    """As for `attention_inputs`, but the slots of the rows of this step hold NaN until the kernel fills them."""
    x = attention_inputs(rng, s, dtype)
    tokens, longest = len(x.pop("q")), int(x["max_seq_len"])
    stored = store_inputs(rng, {**s, "T": tokens}, dtype)
    where = [(b, np.arange(length - rows, length, dtype=np.int32)) for b, (length, rows) in enumerate(s["requests"])]
    positions = np.concatenate([np.zeros(0, np.int32), *(at for _, at in where)])
    pages = [x["page_table"][b, at // s["S"]] for b, at in where]
    slots = np.concatenate([np.zeros(0, np.int32), *pages]) * s["S"] + positions % s["S"]
    for name in ("k_cache", "v_cache"):
        x[name][LAYER, slots // s["S"], :, slots % s["S"]] = np.nan
    angles = rng.uniform(0, 2 * np.pi, (longest + 1, s["D"] // 2))
    return {
        **{name: stored[name] for name in ("qkv", "q_norm", "k_norm")},
        "cos_sin": np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32),
        "positions": positions,
        "slots": slots.astype(np.int32),
        **x,
    }
