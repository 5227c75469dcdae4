"""Conversion and packing of weights against loops that say what they mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mili.models.packing import (
    bf16_to_f32,
    concat_rows,
    convert,
    f32_to_bf16,
    pack_panels,
    panel_shape,
    storage_dtype,
)

DTYPES = ["bfloat16", "float32"]


def naive_panels(matrix: np.ndarray) -> np.ndarray:
    """[N, K] -> [ceil(N / 32), K * 32], element by element."""
    num_rows, num_columns = matrix.shape
    out = np.zeros((-(-num_rows // 32), num_columns * 32), matrix.dtype)
    for n in range(num_rows):
        for k in range(num_columns):
            pair = (k // 2 * 32 + n % 32) * 2 + k % 2
            out[n // 32, pair if matrix.dtype == np.uint16 else k * 32 + n % 32] = matrix[n, k]
    return out


def random_bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=3), st.sampled_from([2, 6, 34]), st.sampled_from(DTYPES))
def test_panels_equal_the_loop(rows: list[int], columns: int, dtype: str) -> None:
    parts = [random_bits(n, columns, seed=i) for i, n in enumerate(rows)]
    packed = pack_panels(parts, dtype)
    expected = naive_panels(np.concatenate([convert(part, dtype) for part in parts]))
    assert packed.shape == panel_shape(sum(rows), columns) and packed.dtype == storage_dtype(dtype)
    assert packed.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_matrices_take_the_threads_and_the_given_output(dtype: str) -> None:
    parts = [random_bits(n, 1024, seed=n) for n in (1500, 700, 333)]  # several slabs each, parts that straddle panels
    out = np.full(panel_shape(2533, 1024), 7, storage_dtype(dtype))
    assert pack_panels(parts, dtype, out) is out
    matrix = np.zeros((2560, 1024), storage_dtype(dtype))
    matrix[:2533] = np.concatenate([convert(part, dtype) for part in parts])
    unit = 2 if dtype == "bfloat16" else 1
    expected = matrix.reshape(-1, 32, 1024 // unit, unit).transpose(0, 2, 1, 3).reshape(out.shape)
    assert out.tobytes() == expected.tobytes()
    stacked = concat_rows(parts, dtype)
    assert stacked.tobytes() == matrix[:2533].tobytes()


def test_vectors_are_stacked_and_converted() -> None:
    parts = [np.float32([1.0, 2.0]), np.float32([-0.5])]
    assert bf16_to_f32(concat_rows(parts, "bfloat16")).tolist() == [1.0, 2.0, -0.5]
    out = np.empty(3, np.float32)
    assert concat_rows(parts, "float32", out) is out and out.tolist() == [1.0, 2.0, -0.5]


def test_bfloat16_rounding_equals_torch() -> None:
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    halfway = (np.arange(0, 2**16, 7, dtype=np.uint32) << 16) | 0x8000  # ties go to even
    values = np.concatenate([bits, halfway]).view(np.float32)
    values = values[~np.isnan(values)]
    ours = f32_to_bf16(values)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(ours, theirs)


def test_nan_stays_nan_and_overflow_becomes_infinity() -> None:
    nans = np.uint32([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001]).view(np.float32)
    assert np.isnan(bf16_to_f32(f32_to_bf16(nans))).all()
    assert bf16_to_f32(f32_to_bf16(np.float32([3.4e38, -3.4e38]))).tolist() == [np.inf, -np.inf]


def test_every_bfloat16_survives_the_round_trip() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits[~np.isnan(bf16_to_f32(bits))]
    assert np.array_equal(f32_to_bf16(bf16_to_f32(numbers)), numbers)


def test_float16_is_exact_in_float32_and_rounded_in_bfloat16() -> None:
    half = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16)  # every non-negative finite float16
    assert np.array_equal(convert(half, "float32"), half.astype(np.float32))
    assert np.array_equal(convert(half, "bfloat16"), f32_to_bf16(half.astype(np.float32)))


def test_nothing_to_convert_is_no_copy() -> None:
    bits, single = random_bits(4), np.ones(4, np.float32)
    assert convert(bits, "bfloat16") is bits and convert(single, "float32") is single
