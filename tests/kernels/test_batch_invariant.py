"""With `batch_invariant` a GPU's rows have the bits they have alone: what `test_guarantees` checks on every CPU.

bfloat16 alone: float32 has one GPU kernel for each op, whatever the batch.
"""

from itertools import pairwise

import numpy as np
import pytest
from max import driver

from kernels.inputs import Shape
from kernels.oracles import alone, check_same_bits, row_range
from kernels.specs import BY_NAME, HEADS
from support.kernels import Kernels

COUNTS = (1, 3, 8, 9, 16, 17, 33, 64, 65, 130, 300)  # of rows: at least one for every tile, with its neighbours
INVARIANT = {"batch_invariant": True}
PRODUCTS: tuple[tuple[str, Shape], ...] = (
    ("linear", {"K": 1024, "N": 4096, "bias": False, "wide": False}),
    ("linear", {"K": 3072, "N": 1024, "bias": False, "wide": False}),  # few tiles and a long k, which else is split
    ("linear", {"K": 448, "N": 136, "bias": True, "wide": False}),
    ("linear", {"K": 200, "N": 1001, "bias": True, "wide": False}),
    ("linear", {"K": 1024, "N": 1003, "bias": False, "wide": True}),
    ("linear", {"K": 66, "N": 101, "bias": False, "wide": False}),  # no rows of whole 16 bytes
    ("norm_linear", {"H": 1024, "N": 512, "bias": False}),
    ("norm_linear", {"H": 2560, "N": 96, "bias": True}),  # how many warps share a row depends on the rows
    ("norm_linear_silu_mul", {"H": 1024, "I": 384}),
    ("norm_linear_silu_mul", {"H": 2560, "I": 40}),
    ("norm_linear_silu_mul", {"H": 64, "I": 4300}),  # 300 rows get the widest tile, which other warps finish
)
ATTENTION = ("paged_attention", "rope_attention", "qk_norm_rope_store")


def invariant_instances() -> list[tuple[str, Shape]]:
    """(op, static dims) of every instance."""
    paged = [(name, {**heads, "S": 16, **INVARIANT}) for name in ATTENTION for heads in HEADS]
    return [*((name, {**static, **INVARIANT}) for name, static in PRODUCTS), *paged]


@pytest.fixture(scope="session")
def invariant_kernels() -> Kernels:
    if driver.accelerator_count() == 0:
        pytest.skip("needs a GPU")
    return Kernels("bfloat16", invariant_instances(), driver.Accelerator())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "static"), PRODUCTS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_row_is_the_same_in_batches_of_any_size(invariant_kernels: Kernels, name: str, static: Shape) -> None:
    spec = BY_NAME[name]
    shape = {**static, **INVARIANT, "M" if name == "linear" else "T": max(COUNTS)}
    x = spec.inputs(np.random.default_rng(7), shape, "bfloat16")
    most = invariant_kernels.run(name, shape, x)
    few = {output: values[:9] for output, values in most.items()}
    found = spec.violations(row_range(name, x, 0, 9), few, shape, "bfloat16", invariant_kernels.tensor_cores)
    assert not found, "\n".join(found)
    for count in COUNTS:
        for start in {0, max(COUNTS) - count}:
            fewer = invariant_kernels.run(name, shape, row_range(name, x, start, start + count))
            for output, values in fewer.items():
                check_same_bits(most[output][start : start + count], values, f"{output} of {count} rows from {start}")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_a_prompt_is_the_same_whole_in_chunks_and_token_by_token(invariant_kernels: Kernels, heads: Shape) -> None:
    shape = {**heads, **INVARIANT, "S": 16, "requests": ((5, 5), (590, 590), (1, 1), (300, 1))}
    spec = BY_NAME["paged_attention"]
    x = spec.inputs(np.random.default_rng(7), shape, "bfloat16")
    whole = invariant_kernels.run(spec.name, shape, x)
    found = spec.violations(x, whole, shape, "bfloat16", invariant_kernels.tensor_cores)
    assert not found, "\n".join(found)
    singles = (0, 1, 2, 63, 64, 127, 128, 129, 511, 512, 513, 589)
    chunks = [pair for edges in ((0, 1, 16, 17, 128, 511, 590), (0, 300, 590)) for pair in pairwise(edges)]
    for start, end in [*chunks, *((at, at + 1) for at in singles)]:
        chunk = invariant_kernels.run(spec.name, shape, alone(x, 1, start, end))["out"]
        check_same_bits(whole["out"][5 + start : 5 + end], chunk, f"rows {start}:{end}")
    check_same_bits(whole["out"][-1:], invariant_kernels.run(spec.name, shape, alone(x, 3, 0, 1))["out"], "decode")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS, ids=lambda h: "-".join(map(str, h.values())))
def test_one_op_has_the_bits_of_two_also_in_decode(invariant_kernels: Kernels, heads: Shape) -> None:
    requests = tuple((length, 1) for length in (1, 17, 128, 129, 600))
    shape = {**heads, **INVARIANT, "S": 16, "requests": requests, "T": len(requests)}
    x = BY_NAME["rope_attention"].inputs(np.random.default_rng(7), shape, "bfloat16")
    stored = invariant_kernels.run("qk_norm_rope_store", shape, x)
    attended = invariant_kernels.run("paged_attention", shape, {**x, **stored})
    check_same_bits(invariant_kernels.run("rope_attention", shape, x)["out"], attended["out"])
