"""Every kernel computes what its reference does, on every shape of its grid and on lengths nobody chose."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.inputs import Shape
from kernels.specs import BY_NAME, HEADS, PAGE_SIZES, SPECS, KernelSpec
from support.kernels import Kernels

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, database=None)
MAX_CONTEXT = 1100


def failures(kernels: Kernels, spec: KernelSpec, shape: Shape, seed: int) -> list[str]:
    """One run's violations, with the shape."""
    inputs = spec.inputs(np.random.default_rng(seed), shape, kernels.dtype)
    outputs = kernels.run(spec.name, shape, inputs)
    found = spec.violations(inputs, outputs, shape, kernels.dtype, kernels.tensor_cores)
    return [f"{dict(shape)}: {what}" for what in found]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_grid(kernels: Kernels, spec: KernelSpec) -> None:
    shapes = [shape for shape in spec.shapes() if kernels.serves(spec.name, shape)]
    assert shapes
    assert not [what for seed, shape in enumerate(shapes) for what in failures(kernels, spec, shape, seed)]


def requests(max_requests: int = 5) -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    """(seq_len, query_len) pairs: a few long contexts, some decoding and some with a chunk of their prompt."""
    length = st.integers(1, 130) | st.integers(1, MAX_CONTEXT)
    pair = length.flatmap(lambda n: st.tuples(st.just(n), st.just(1) | st.integers(1, min(n, 70))))
    return st.lists(pair, max_size=max_requests).map(tuple)


@EXAMPLES
@given(heads=st.sampled_from(HEADS), page_size=st.sampled_from(PAGE_SIZES), pairs=requests(), seed=st.integers(0, 99))
def test_attention_of_any_batch(cpu_kernels, heads, page_size, pairs, seed) -> None:
    shape = {**heads, "S": page_size, "requests": pairs}
    assert not failures(cpu_kernels, BY_NAME["paged_attention"], shape, seed)


@EXAMPLES
@given(
    heads=st.sampled_from(HEADS),
    page_size=st.sampled_from(PAGE_SIZES),
    tokens=st.integers(0, 150),
    seed=st.integers(0, 99),
)
def test_store_of_any_length(cpu_kernels, heads, page_size, tokens, seed) -> None:
    shape = {**heads, "S": page_size, "T": tokens}
    assert not failures(cpu_kernels, BY_NAME["qk_norm_rope_store"], shape, seed)


@EXAMPLES
@given(data=st.data(), rows=st.integers(0, 70), seed=st.integers(0, 99))
def test_row_wise_kernels_of_any_length(cpu_kernels, data, rows, seed) -> None:
    spec = data.draw(st.sampled_from([s for s in SPECS if "S" not in s.grid[0] and s.name != "take_rows"]))
    static = data.draw(st.sampled_from([s for s in spec.statics if s.get("N", 1) < 1000]))
    shape = {**spec.grid[-1], **static, "M" if spec.name == "linear" else "T": rows}
    assert not failures(cpu_kernels, spec, shape, seed)
