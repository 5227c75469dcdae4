"""Checks beyond values, and the ways to rearrange a batch under which results may not change.

Each check raises AssertionError with a reason; `test_planted_bugs` shows each one failing. Rearrangements take and
return inputs as `kernels.inputs` makes them.
"""

import numpy as np
from numpy.random import Generator

from kernels.inputs import LAYER
from kernels.specs import same_bits
from support.reference import Array, Arrays, gather

# One entry for each row.
ROW_INPUTS = ("token_ids", "x", "attended", "residual", "gate_up", "qkv", "positions", "slots")
CACHES = ("k_cache", "v_cache")


def check_same_bits(expected: Array, got: Array, what: str = "output") -> None:
    """Equal shapes and bits."""
    assert expected.shape == got.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    assert same_bits(expected, got), f"{what}: {int((expected != got).sum())} of {got.size} elements differ"


def check_caches_kept(inputs: Arrays, outputs: Arrays) -> None:
    """The caches hold after the call what they held before."""
    for name in CACHES:
        check_same_bits(inputs[name], outputs[name], name)


def check_only_slots_written(inputs: Arrays, outputs: Arrays) -> None:
    """Slots and layers that the call did not name keep their random contents to the bit; the named ones change."""
    page_size = inputs["v_cache"].shape[3]
    page, offset = inputs["slots"] // page_size, inputs["slots"] % page_size
    for name in CACHES:
        before, after = inputs[name].copy(), outputs[name].copy()
        assert (before[LAYER, page, :, offset] != after[LAYER, page, :, offset]).any(axis=(1, 2)).all(), (
            f"{name}: unwritten"
        )
        before[LAYER, page, :, offset] = after[LAYER, page, :, offset] = 0
        check_same_bits(before, after, f"{name} outside the slots")


def fill_unused(x: Arrays, value: float) -> Arrays:
    """NaN of the caches replaced."""
    return {**x, **{name: np.where(np.isnan(x[name]), np.float32(value), x[name]) for name in CACHES}}


def row_range(name: str, x: Arrays, start: int, end: int) -> Arrays:
    """Rows start ... end - 1 of a row-wise kernel's batch."""
    return {key: values[start:end] if key in ROW_INPUTS else values for key, values in x.items()}


def alone(x: Arrays, b: int, start: int, end: int) -> Arrays:
    """Rows start ... end - 1 of request b as a batch of one, at the positions they had."""
    first, last = x["query_starts"][b : b + 2]
    length = x["seq_lens"][b] - (last - first) + end
    return {
        **x,
        "q": x["q"][first + start : first + end],
        "page_table": x["page_table"][b : b + 1],
        "query_starts": np.array([0, end - start], np.int32),
        "seq_lens": np.array([length], np.int32),
        "max_query_len": np.array(end - start, np.int32),
        "max_seq_len": np.array(length, np.int32),
    }


def moved(x: Arrays, rng: Generator) -> Arrays:
    """The same pages in other places, page 0 staying where it is."""
    pages = x["v_cache"].shape[1]
    to = np.concatenate([[0], 1 + rng.permutation(pages - 1)]).astype(np.int32)
    caches = {name: np.empty_like(x[name]) for name in CACHES}
    for name in CACHES:
        caches[name][:, to] = x[name]
    return {**x, **caches, "page_table": to[x["page_table"]]}


def repaged(x: Arrays, page_size: int) -> Arrays:
    """The same tokens in pages of another length."""
    needed = [-(-int(length) // page_size) for length in x["seq_lens"]]
    layers, _, kv_heads, _, head_dim = x["v_cache"].shape
    table = np.zeros((len(needed), max(needed)), np.int32)
    caches = {n: np.full((layers, sum(needed) + 1, kv_heads, page_size, head_dim), np.nan, np.float32) for n in CACHES}
    for b, count in enumerate(needed):
        table[b, :count] = 1 + sum(needed[:b]) + np.arange(count)
        length = int(x["seq_lens"][b])
        slots = np.arange(length)
        for name in CACHES:
            tokens = gather(x[name][LAYER], x["page_table"][b], length)  # [Hkv, length, D]
            caches[name][LAYER, table[b, slots // page_size], :, slots % page_size] = tokens.swapaxes(0, 1)
    return {**x, **caches, "page_table": table}
