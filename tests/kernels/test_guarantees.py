"""What the kernels promise beyond values: what they leave alone, and that neighbours never change a row's bits."""

import os
from itertools import pairwise

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
    row_range,
)
from kernels.specs import BY_NAME, HEADS, PAGE_SIZES, SPECS, KernelSpec
from support.kernels import Kernels

ATTENTION, STORE = BY_NAME["paged_attention"], BY_NAME["qk_norm_rope_store"]
REQUESTS = ((40, 40), (1100, 1), (600, 33), (1, 1), (17, 5), (512, 2), (65, 65))
heads = pytest.mark.parametrize("heads", HEADS, ids=lambda h: "-".join(map(str, h.values())))


def inputs(spec: KernelSpec, kernels: Kernels, shape: Shape):
    return spec.inputs(np.random.default_rng(7), shape, kernels.dtype)


def attend(kernels: Kernels, shape: Shape, x) -> np.ndarray:
    return kernels.run("paged_attention", shape, x)["out"]


@heads
def test_store_leaves_every_other_slot_and_layer_alone(kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, "S": 16, "T": 21}
    x = inputs(STORE, kernels, shape)
    check_only_slots_written(x, kernels.run(STORE.name, shape, x))


@heads
def test_attention_writes_no_cache(kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, "S": 16, "requests": REQUESTS}
    x = inputs(ATTENTION, kernels, shape)
    check_caches_kept(x, kernels.run(ATTENTION.name, shape, x))


@heads
def test_unused_slots_pages_and_layers_never_reach_the_output(kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, "S": 16, "requests": REQUESTS}
    x = inputs(ATTENTION, kernels, shape)  # NaN wherever no request has a token
    out = attend(kernels, shape, x)
    assert np.isfinite(out).all()
    for value in (0.0, -3e38):
        check_same_bits(out, attend(kernels, shape, fill_unused(x, value)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_two_runs_are_equal(kernels: Kernels, spec: KernelSpec) -> None:
    for static in spec.statics:
        shape = {**spec.grid[-1], **static} | ({"S": 16} if "S" in spec.grid[0] else {})
        x = inputs(spec, kernels, shape)
        first, second = kernels.run(spec.name, shape, x), kernels.run(spec.name, shape, x)
        for name, values in first.items():
            check_same_bits(values, second[name], name)


ROW_WISE = (
    "embedding",
    "add_rms_norm",
    "silu_mul",
    "linear",
    "norm_linear",
    "norm_linear_silu_mul",
    "feed_forward",
    "qk_norm_rope_store",
)


@pytest.mark.parametrize("name", ROW_WISE)
def test_a_row_is_the_same_alone_and_in_a_crowd(cpu_kernels: Kernels, name: str) -> None:
    """Also a prompt's rows in chunks and whole: to these kernels a chunk is some rows of the batch."""
    spec = BY_NAME[name]
    for static in spec.statics:
        shape = {**spec.grid[-1], **static, "M" if name == "linear" else "T": 38} | (
            {"S": 16} if "S" in spec.grid[0] else {}
        )
        x = inputs(spec, cpu_kernels, shape)
        crowd = cpu_kernels.run(name, shape, x)
        for start, end in ((0, 1), (37, 38), (1, 3), (3, 14), (13, 38)):
            some = cpu_kernels.run(name, shape, row_range(name, x, start, end))
            for output in set(some) - {"k_cache", "v_cache"}:
                check_same_bits(crowd[output][start:end], some[output], f"{dict(static)} {output} {start}:{end}")
            page, offset = (f(x.get("slots", np.zeros(0, int))[start:end], 16) for f in (np.floor_divide, np.mod))
            for cache in set(some) & {"k_cache", "v_cache"}:
                check_same_bits(crowd[cache][LAYER, page, :, offset], some[cache][LAYER, page, :, offset], cache)


@heads
def test_a_request_is_the_same_alone_and_in_a_crowd(cpu_kernels: Kernels, heads: Shape) -> None:
    """The crowd has more tasks than cores can share, so its contexts run in sequence; alone they are split."""
    crowded = (*REQUESTS, *((3, 2),) * (2 * (os.cpu_count() or 1)))
    shape = {**heads, "S": 16, "requests": crowded}
    x = inputs(ATTENTION, cpu_kernels, shape)
    crowd = attend(cpu_kernels, shape, x)
    for b, (length, rows) in enumerate(REQUESTS):
        start = x["query_starts"][b]
        check_same_bits(crowd[start : start + rows], attend(cpu_kernels, shape, alone(x, b, 0, rows)), f"{length}")


@heads
def test_a_decoded_row_is_the_same_in_every_crowd(kernels: Kernels, heads: Shape) -> None:
    """On a GPU the size of the crowd decides how many blocks share a request, and whether they are a cluster."""
    shape = {**heads, "S": 16, "requests": tuple((length, 1) for length in (700, 1, 64, 130)) * 16}
    x = inputs(ATTENTION, kernels, shape)
    crowd = attend(kernels, shape, x)
    for count in (1, 2, 4, 8, 16, 32):
        some = {name: x[name][:count] for name in ("q", "page_table", "seq_lens")}
        some |= {"query_starts": x["query_starts"][: count + 1]}
        check_same_bits(crowd[:count], attend(kernels, shape, {**x, **some}), f"{count} requests")


@heads
def test_a_prompt_is_the_same_whole_and_in_chunks(cpu_kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, "S": 16, "requests": ((5, 5), (590, 590))}
    x = inputs(ATTENTION, cpu_kernels, shape)
    whole = attend(cpu_kernels, shape, x)[5:]
    for edges in ((0, 1, 16, 48, 511, 512, 513, 590), (0, 300, 590)):
        for start, end in pairwise(edges):
            chunk = attend(cpu_kernels, shape, alone(x, 1, start, end))
            check_same_bits(whole[start:end], chunk, f"rows {start}:{end}")


@heads
def test_one_op_has_the_bits_of_two(kernels: Kernels, heads: Shape) -> None:
    """Whether it runs them one after the other or, with one token for each request on a GPU, in one kernel."""
    spec = BY_NAME["rope_attention"]
    for pairs in (REQUESTS, tuple((length, 1) for length, _ in REQUESTS), ((1, 1),)):
        shape = {**heads, "S": 16, "requests": pairs, "T": sum(rows for _, rows in pairs)}
        x = inputs(spec, kernels, shape)
        got = kernels.run(spec.name, shape, x)
        stored = kernels.run(STORE.name, shape, x)
        check_same_bits(got["out"], attend(kernels, shape, {**x, **stored}))
        for cache in ("k_cache", "v_cache"):
            check_same_bits(got[cache], stored[cache], cache)


@heads
def test_where_pages_lie_and_how_long_they_are_does_not_matter(cpu_kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, "S": 16, "requests": REQUESTS}
    x = inputs(ATTENTION, cpu_kernels, shape)
    out = attend(cpu_kernels, shape, x)
    check_same_bits(out, attend(cpu_kernels, shape, moved(x, np.random.default_rng(1))), "moved")
    for page_size in PAGE_SIZES:
        check_same_bits(out, attend(cpu_kernels, shape, repaged(x, page_size)), f"page size {page_size}")
