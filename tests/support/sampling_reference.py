"""The sampler written plainly in NumPy float64 and Python integers: what `mili.sample` should do to a row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float64]  # [V]


def philox(seed: int, position: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011) with key `seed` and counter (position, 0, 0, 0)."""
    return philox_block((position, 0, 0, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


def philox_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def random_bits(seed: int, position: int) -> int:
    """The 64 bits that decide the draw at `position`."""
    low, high, _, _ = philox(seed, position)
    return low | high << 32


def clean(logits: npt.ArrayLike) -> Row:
    """NaN as -inf and +inf as the largest float32."""
    x = np.asarray(logits, dtype=np.float64)
    return np.where(np.isnan(x), -np.inf, np.minimum(x, np.finfo(np.float32).max))


def edited(logits: npt.ArrayLike, edits: Sequence[tuple[int, float, float, float]]) -> Row:
    """`logits` [V] after edits (token_id, bias, repetition, subtract)."""
    x = np.array(logits, dtype=np.float64)
    for token_id, bias, repetition, subtract in edits:
        y = x[token_id] + bias
        x[token_id] = (y / repetition if y > 0 else y * repetition) - subtract
    return x


def masked(logits: npt.ArrayLike, words: Sequence[int]) -> Row:
    """`logits` [V] with -inf where bit i % 32 of word i // 32 is 0; tokens past the last word have no bit."""
    x = np.array(logits, dtype=np.float64)
    for i in range(len(x)):
        if i // 32 >= len(words) or not (words[i // 32] & 0xFFFFFFFF) >> (i % 32) & 1:
            x[i] = -np.inf
    return x


def kept(logits: npt.ArrayLike, temperature: float, top_p: float, top_k: int, min_p: float) -> npt.NDArray[np.bool_]:
    """[V] which tokens the filters keep, in the order top_k, top_p, min_p; ties with the last one are kept."""
    x = clean(logits)
    keep = np.isfinite(x)
    if 0 < top_k < len(x):
        keep &= x >= np.sort(x)[-top_k]
    mass = np.where(keep, np.exp((x - x.max()) / temperature), 0)
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        cumulative = np.cumsum(mass[order])
        last = order[np.searchsorted(cumulative, top_p * cumulative[-1])]
        keep &= x >= x[last]
    return keep & (mass >= min_p)


def probabilities(logits: npt.ArrayLike, temperature: float, top_p: float, top_k: int, min_p: float) -> Row:
    """[V] the distribution that a draw follows."""
    x = clean(logits)
    mass = np.where(kept(x, temperature, top_p, top_k, min_p), np.exp((x - x.max()) / temperature), 0)
    result: Row = mass / mass.sum()
    return result


def log_softmax(logits: npt.ArrayLike) -> Row:
    """[V] log-probabilities."""
    x = clean(logits)
    result: Row = x - x.max() - np.log(np.exp(x - x.max()).sum())
    return result


def rank(logits: npt.ArrayLike, token_id: int) -> int:
    """1 + the number of larger logits."""
    x = clean(logits)
    return 1 + int((x > x[token_id]).sum())


def top(logits: npt.ArrayLike, count: int) -> npt.NDArray[Any]:
    """The `count` likeliest token ids, lowest id first among equals."""
    return np.argsort(-clean(logits), kind="stable")[:count]
