"""An oracle nobody has seen fail is not an oracle: every check of the kernels rejects a wrong result.

The bugs are planted in the naive implementation, so that what is rejected has a kernel's rounding and one mistake.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from kernels.inputs import LAYER, Shape
from kernels.oracles import (
    alone,
    check_caches_kept,
    check_only_slots_written,
    check_same_bits,
    fill_unused,
    moved,
    repaged,
)
from kernels.specs import BY_NAME, DTYPES, SPECS, KernelSpec
from support.reference import Array, Arrays, attention, exact, gather, naive, paged_attention, rms_norm, round_to

Bug = Callable[[KernelSpec, Arrays, Shape, str], Arrays]

ATTENTION, STORE = BY_NAME["paged_attention"], BY_NAME["qk_norm_rope_store"]
HEADS = {"Hq": 4, "Hkv": 2, "D": 64, "S": 16}
PAGED = {**HEADS, "requests": ((40, 7), (20, 1), (530, 3), (33, 33))}
SHAPES: dict[str, Shape] = {
    "embedding": {"H": 34, "T": 17, "V": 64},
    "add_rms_norm": {"H": 95, "T": 17},
    "take_rows": {"A": 64, "H": 95, "T": 17, "R": 6},
    "silu_mul": {"I": 45, "T": 17},
    "linear": {"K": 66, "N": 101, "M": 13, "bias": True, "wide": False},
    "norm_linear": {"H": 66, "N": 101, "bias": True, "T": 9},
    "norm_linear_silu_mul": {"H": 66, "I": 45, "T": 9},
    "feed_forward": {"Q": 128, "H": 64, "I": 46, "T": 5},
    "qk_norm_rope_store": {**HEADS, "T": 17},
    "paged_attention": PAGED,
    "rope_attention": PAGED,
}


def wrong_inputs(change: Callable[[Arrays], Arrays]) -> Bug:
    """A kernel that computes the right thing on the wrong operands."""

    def bug(spec: KernelSpec, x: Arrays, shape: Shape, dtype: str) -> Arrays:
        return spec.compute(naive(dtype), {**x, **change(x)}, shape)

    return bug


def wrong_output(name: str, change: Callable[[Array, Arrays], Array]) -> Bug:
    """A kernel that does the wrong thing with the right result."""

    def bug(spec: KernelSpec, x: Arrays, shape: Shape, dtype: str) -> Arrays:
        outputs = spec.compute(naive(dtype), x, shape)
        return {**outputs, name: round_to(dtype, change(outputs[name].copy(), x))}

    return bug


def no_eps(spec: KernelSpec, x: Arrays, shape: Shape, dtype: str) -> Arrays:
    outputs = spec.compute(naive(dtype), x, shape)
    total = round_to(dtype, x["x"] + x["residual"])
    with np.errstate(invalid="ignore"):
        return {**outputs, "y": np.nan_to_num(rms_norm(naive(dtype), total, x["weight"], 0.0))}


def bf16_sums(spec: KernelSpec, x: Arrays, shape: Shape, dtype: str) -> Arrays:
    """Accumulates in bfloat16 instead of float32."""

    def dot(a: Array, b: Array) -> Array:
        total = np.zeros((a.shape[0], b.shape[0]), np.float32)
        for k in range(a.shape[1]):
            total = round_to("bfloat16", total + np.outer(a[:, k], b[:, k]))
        return total

    return spec.compute(replace(naive(dtype), dot=dot), x, shape)


def normed_product(rows: Array, x: Arrays) -> Array:
    """The rows' norm times the weight."""
    return rms_norm(naive("float32"), rows, x["gain"], 1e-6) @ x["weight"].T + x["bias"]


def mask(shift: int) -> Bug:
    """Rows see keys up to their position + `shift`."""

    def bug(spec: KernelSpec, x: Arrays, shape: Shape, dtype: str) -> Arrays:
        outputs = spec.compute(naive(dtype), x, shape)
        out, starts = outputs["out"].copy(), x["query_starts"]
        for b, length in enumerate(x["seq_lens"].tolist()):
            start, end = starts[b : b + 2]
            k, v = (gather(x[name][LAYER], x["page_table"][b], length) for name in ("k_cache", "v_cache"))
            first = max(length - (end - start) + shift, 0)
            rows = x["q"][start:end].reshape(end - start, -1, shape["D"])
            out[start:end] = attention(naive(dtype), rows, k, v, first, shape["D"] ** -0.5).reshape(end - start, -1)
        return {**outputs, "out": out}

    return bug


def heads(x: Array, shape: Shape) -> Array:
    """[T, heads, D] view of rows of heads."""
    return x.reshape(len(x), -1, shape["D"])


def interleaved(cos_sin: Array) -> Array:
    """The angles of pairs (2i, 2i + 1), put where pairs (i, i + D/2) are expected."""
    half = cos_sin.shape[1] // 2
    order = np.arange(half).reshape(2, -1).T.reshape(-1)
    return np.concatenate([cos_sin[:, :half][:, order], cos_sin[:, half:][:, order]], axis=1)


def first_page_lost(x: Arrays) -> Arrays:
    return {"page_table": np.concatenate([x["page_table"][:, 1:2], x["page_table"][:, 1:]], axis=1)}


def sine_sign(x: Arrays) -> Arrays:
    half = x["cos_sin"].shape[1] // 2
    return {"cos_sin": x["cos_sin"] * np.repeat(np.array([1, -1], np.float32), half)}


BUGS: dict[str, dict[str, Bug]] = {
    "embedding": {
        "the next row": wrong_inputs(lambda x: {"token_ids": (x["token_ids"] + 1) % len(x["table"])}),
        "a residual stream that is not zero": wrong_output("zeros", lambda y, x: y + 1e-30),
        "negative zero": wrong_output("zeros", lambda y, x: -y),
    },
    "add_rms_norm": {
        "no weight": wrong_inputs(lambda x: {"weight": np.ones_like(x["weight"])}),
        "no residual": wrong_inputs(lambda x: {"residual": np.zeros_like(x["residual"])}),
        "no eps": no_eps,
        "mean over H - 1": wrong_output("y", lambda y, x: y * (1 - 1 / y.shape[1]) ** 0.5),
        "the old residual": wrong_output("residual_out", lambda y, x: x["residual"]),
        "one element of the tail missing": wrong_output("y", lambda y, x: np.where(np.arange(95) == 94, 0, y)),
    },
    "take_rows": {
        "the first rows": wrong_inputs(lambda x: {"rows": np.arange(6)}),
        "one element of the tail missing": wrong_output("b_rows", lambda y, x: np.where(np.arange(95) == 94, 0, y)),
        "other rows of the second": wrong_output("b_rows", lambda y, x: y[::-1]),
    },
    "silu_mul": {
        "up first": wrong_inputs(lambda x: {"gate_up": np.roll(x["gate_up"], 45, axis=1)}),
        "halves off by one": wrong_inputs(lambda x: {"gate_up": np.roll(x["gate_up"], 1, axis=1)}),
        "GELU's sigmoid": wrong_inputs(lambda x: {"gate_up": x["gate_up"] * np.repeat([1.702, 1 / 1.702], 45)}),
    },
    "linear": {
        "no bias": wrong_inputs(lambda x: {"bias": np.zeros_like(x["bias"])}),
        "the last k lost": wrong_inputs(lambda x: {"x": x["x"] * (np.arange(66) < 65)}),
        "neighbours in k swapped": wrong_inputs(lambda x: {"x": x["x"].reshape(-1, 33, 2)[..., ::-1].reshape(-1, 66)}),
        "the last panel's columns shifted": wrong_output(
            "y", lambda y, x: np.r_["1", y[:, :96], y[:, [97, 98, 99, 100, 96]]]
        ),
        "one row of a tile repeated": wrong_output("y", lambda y, x: y[[*range(12), 11]]),
        "sums in bfloat16": bf16_sums,
    },
    "norm_linear": {
        "no gain": wrong_inputs(lambda x: {"gain": np.ones_like(x["gain"])}),
        "the old residual": wrong_output("residual_out", lambda y, x: x["residual"]),
        "the norm of x alone": wrong_output("y", lambda y, x: normed_product(x["x"], x)),
        "no norm": wrong_output("y", lambda y, x: (x["x"] + x["residual"]) @ x["weight"].T),
        "no bias": wrong_inputs(lambda x: {"bias": np.zeros_like(x["bias"])}),
    },
    "norm_linear_silu_mul": {
        "up first": wrong_inputs(lambda x: {"weight": np.roll(x["weight"], 45, axis=0)}),
        "halves off by one": wrong_inputs(lambda x: {"weight": np.roll(x["weight"], 1, axis=0)}),
        "the old residual": wrong_output("residual_out", lambda y, x: x["residual"]),
        "no gain": wrong_inputs(lambda x: {"gain": np.ones_like(x["gain"])}),
        "a row repeated": wrong_output("y", lambda y, x: y[[*range(8), 7]]),
    },
    "feed_forward": {
        "up first": wrong_inputs(lambda x: {"w_gate_up": np.roll(x["w_gate_up"], 46, axis=0)}),
        "the old residual": wrong_output("residual_out", lambda y, x: x["residual"]),
        "no residual": wrong_inputs(lambda x: {"residual": np.zeros_like(x["residual"])}),
        "no gain": wrong_inputs(lambda x: {"gain": np.ones_like(x["gain"])}),
        "an eight of down's rows of another warp": wrong_output("y", lambda y, x: y[:, [*range(56), *range(48, 56)]]),
        "an activation of the launch before": wrong_inputs(lambda x: {"w_down": x["w_down"] * (np.arange(46) > 0)}),
    },
    "qk_norm_rope_store": {
        "the next position": wrong_inputs(lambda x: {"positions": (x["positions"] + 1) % len(x["cos_sin"])}),
        "interleaved pairs": wrong_inputs(lambda x: {"cos_sin": interleaved(x["cos_sin"])}),
        "the other direction": wrong_inputs(sine_sign),
        "gains swapped": wrong_inputs(lambda x: {"q_norm": x["k_norm"], "k_norm": x["q_norm"]}),
        "slots off by one": wrong_inputs(lambda x: {"slots": (x["slots"] + 1) % (x["v_cache"].shape[1] * 16)}),
        "the other layer": wrong_inputs(lambda x: {"layer": 1 - x["layer"]}),
        "v scaled": wrong_output("v_cache", lambda y, x: y * 1.01),
    },
    "paged_attention": {
        "one key too many": mask(1),
        "one key too few": mask(-1),
        "no scale": wrong_inputs(lambda x: {"q": x["q"] * 8}),
        "heads of a group spread out": wrong_inputs(
            lambda x: {"q": x["q"].reshape(-1, 2, 2, 64).swapaxes(1, 2).reshape(-1, 256)}
        ),
        "first page lost": wrong_inputs(first_page_lost),
        "pages in order": wrong_inputs(lambda x: {"page_table": np.sort(x["page_table"], axis=1)}),
        "keys as values": wrong_inputs(lambda x: {"v_cache": x["k_cache"]}),
        "the other layer": wrong_inputs(lambda x: {"layer": 1 - x["layer"]}),
        "a slot past the end": wrong_inputs(lambda x: {"seq_lens": x["seq_lens"] + 1}),
        "a write to the cache": wrong_output("k_cache", lambda y, x: np.nan_to_num(y)),
    },
    "rope_attention": {
        "the next position": wrong_inputs(lambda x: {"positions": x["positions"] + 1}),
        "gains swapped": wrong_inputs(lambda x: {"q_norm": x["k_norm"], "k_norm": x["q_norm"]}),
        "a key not stored": wrong_inputs(lambda x: {"slots": np.r_[x["slots"][:-1], 0]}),
        "a slot past the end": wrong_inputs(lambda x: {"seq_lens": x["seq_lens"] + 1}),
        "the other layer": wrong_inputs(lambda x: {"layer": 1 - x["layer"]}),
        "first page lost": wrong_inputs(first_page_lost),
        "v scaled": wrong_output("v_cache", lambda y, x: y * 1.01),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_values_accept_the_naive_result_and_reject_every_bug(spec: KernelSpec, dtype: str) -> None:
    shape = SHAPES[spec.name]
    x = spec.inputs(np.random.default_rng(3), shape, dtype)
    assert not spec.violations(x, spec.compute(naive(dtype), x, shape), shape, dtype)
    missed = []
    for label, bug in BUGS[spec.name].items():
        with np.errstate(invalid="ignore"):
            outputs = {name: round_to(dtype, values) for name, values in bug(spec, x, shape, dtype).items()}
            if not spec.violations(x, outputs, shape, dtype):
                missed.append(label)
    assert not missed


def test_same_bits_sees_one_bit_a_sign_of_zero_and_another_order_of_adding() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    for wrong in (np.nextafter(values, np.float32(9)), values[:-1], values[::-1]):
        with pytest.raises(AssertionError):
            check_same_bits(values, wrong)
    with pytest.raises(AssertionError):
        check_same_bits(np.zeros(1), -np.zeros(1))
    with pytest.raises(AssertionError):
        check_same_bits(values.cumsum()[-1:], values[::-1].cumsum()[-1:])


@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_the_guard_sees_a_stray_write_and_a_missing_one(cache: str) -> None:
    shape = {**HEADS, "T": 5}
    x = STORE.inputs(np.random.default_rng(0), shape, "float32")
    good = STORE.compute(naive("float32"), x, shape)
    check_only_slots_written(x, good)
    used = set(x["slots"].tolist())
    free = next(slot for slot in range(16) if slot not in used)
    for layer, slot in ((LAYER, free), (1 - LAYER, min(used)), (LAYER, min(used))):
        bad = {**good, cache: good[cache].copy()}
        if layer == LAYER and slot in used:
            bad[cache][layer, slot // 16, :, slot % 16] = x[cache][layer, slot // 16, :, slot % 16]
        else:
            bad[cache][layer, slot // 16, 0, slot % 16, 3] += np.float32(1e-6)
        with pytest.raises(AssertionError):
            check_only_slots_written(x, bad)
    with pytest.raises(AssertionError):
        check_caches_kept(x, good)


def test_the_nan_guard_sees_a_slot_past_the_end() -> None:
    x = ATTENTION.inputs(np.random.default_rng(0), PAGED, "float32")
    greedy = {**x, "seq_lens": x["seq_lens"] + 1, "query_starts": x["query_starts"]}
    outputs = [paged_attention(naive("float32"), given, 64, 0.125) for given in (greedy, fill_unused(greedy, 0.0))]
    assert np.isnan(outputs[0]).any()
    with pytest.raises(AssertionError):
        check_same_bits(*outputs)


def test_rearranged_batches_mean_the_same() -> None:
    x = ATTENTION.inputs(np.random.default_rng(0), PAGED, "float32")
    whole = paged_attention(exact("float32"), x, 64, 0.125)
    for other in (moved(x, np.random.default_rng(1)), repaged(x, 2), repaged(x, 64), fill_unused(x, 5.0)):
        assert any(not np.array_equal(x[name], other[name], equal_nan=True) for name in x)
        np.testing.assert_allclose(paged_attention(exact("float32"), other, 64, 0.125), whole, rtol=1e-12)
    for b, (start, end) in enumerate(((2, 7), (0, 1), (1, 3), (0, 20))):
        first = x["query_starts"][b]
        some = paged_attention(exact("float32"), alone(x, b, start, end), 64, 0.125)
        np.testing.assert_allclose(some, whole[first + start : first + end], rtol=1e-12)
