"""The rotary-embedding table: cosines and sines of every position, plain or with static YaRN.

Math:    angle[p, i] = p * inv_freq[i],  inv_freq[i] = theta^(-2i / head_dim), i < head_dim / 2
         YaRN blends inv_freq (dimensions that turn often) with inv_freq / factor (those that turn rarely) by a linear
         ramp, and scales the table by an attention factor.
Source:  Su 2021 (RoFormer), Peng 2023 (YaRN); step by step as transformers' ``_compute_yarn_parameters``.

Knows nothing of devices or layers. Invariant: frequencies are rounded to float32 at the same places as in transformers,
because one unit in the last place of ``inv_freq`` is a visible angle at position 100,000.
"""

import math

import numpy as np
from numpy.typing import NDArray

from mili.config import RopeConfig

_ROWS_PER_BLOCK = 8192  # keeps the float32 temporaries of the table small


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies, float32 [head_dim / 2], and the factor the table is multiplied by."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # [head_dim / 2]
    # float64 power rounded once is what torch's float32 power returns but for rare last bits; NumPy's float32 is not.
    wavelengths = np.power(np.float64(rope.theta), exponents.astype(np.float64)).astype(np.float32)
    one = np.float32(1.0)
    if rope.type == "default":
        return one / wavelengths, 1.0
    extrapolation = one / wavelengths
    interpolation = one / (np.float32(rope.factor) * wavelengths)
    low, high = _correction_range(rope, head_dim)
    steps = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((steps - np.float32(low)) / np.float32(high - low), np.float32(0.0), one)  # 0: turns often
    keep = one - ramp
    return interpolation * (one - keep) + extrapolation * keep, _attention_factor(rope)


def _correction_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """First and last dimension of the ramp: those turning ``beta_fast`` and ``beta_slow`` times in the old context."""

    def dimension(turns: float) -> float:
        turn_len = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(turn_len) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high  # an empty ramp would divide by zero


def _attention_factor(rope: RopeConfig) -> float:
    """Compensates the entropy of attention over a longer context: 0.1 ln(factor) + 1 unless the config says more."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rope_table(rope: RopeConfig, head_dim: int, max_len: int) -> NDArray[np.float32]:
    """Cosines then sines of positions 0..max_len-1, float32 [max_len, head_dim], C-contiguous."""
    frequencies, factor = rope_frequencies(rope, head_dim)
    half = head_dim // 2
    table = np.empty((max_len, head_dim), dtype=np.float32)
    for start in range(0, max_len, _ROWS_PER_BLOCK):
        rows = table[start : start + _ROWS_PER_BLOCK]
        angles = np.arange(start, start + len(rows), dtype=np.float32)[:, None] * frequencies  # [rows, half]
        np.multiply(np.cos(angles), np.float32(factor), out=rows[:, :half])
        np.multiply(np.sin(angles), np.float32(factor), out=rows[:, half:])
    return table
