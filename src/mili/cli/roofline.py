"""What a step must at least move and compute, and so how fast a device could at best be.

A floor: weights are read once a step, keys and values once, every other intermediate stays on the chip, and moving
overlaps with computing without loss. What is left out (activations, logits, launches) makes a floor lower, never
higher. Knows the model's shapes and a dtype's size; knows no device and no kernel. Source: Williams et al. 2009.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mili.config import ModelConfig
from mili.memory import itemsize, kv_bytes_per_token, weight_bytes

__all__ = ["Ceilings", "Work", "decode_step", "generation", "prefill"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device can do: bytes per second of its memory, matrix flops per second; None where nobody knows."""

    bytes_per_s: float
    flops_per_s: float | None


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that must come from or go to memory, and multiplications and additions, each counted."""

    bytes: float
    flops: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time; by the memory alone where the other ceiling is not known."""
        compute = 0.0 if ceilings.flops_per_s is None else self.flops / ceilings.flops_per_s
        return max(self.bytes / ceilings.bytes_per_s, compute)


def decode_step(model: ModelConfig, dtype: str, batch: int, context: float) -> Work:
    """One token for each of `batch` requests that have `context` tokens, the new one included."""
    rows = Work(0, batch * (_layer_flops(model) + _head_flops(model) + _attention_flops(model, context)))
    return Work(_weights(model, dtype, batch) + batch * context * kv_bytes_per_token(model, dtype), 0) + rows


def prefill(model: ModelConfig, dtype: str, lengths: Sequence[int]) -> Work:
    """Prompts of these lengths, in one step; logits for the last row of each.

    In the last layer the other rows must leave their keys and values, and nothing else.
    """
    tokens, prompts, above = sum(lengths), len(lengths), 1 - 1 / model.num_hidden_layers
    seen = sum(length * (length + 1) / 2 for length in lengths)  # keys that rows attend to in a layer above
    rows = above * tokens * _layer_flops(model) + (1 - above) * prompts * _layer_flops(model)
    stored = (tokens - prompts) * 4 * model.hidden_size * model.num_key_value_heads * model.head_dim
    attended = above * _attention_flops(model, seen) + (1 - above) * _attention_flops(model, tokens)
    flops = rows + stored + attended + prompts * _head_flops(model)
    return Work(_weights(model, dtype, tokens) + tokens * kv_bytes_per_token(model, dtype), flops)


def generation(model: ModelConfig, dtype: str, lengths: Sequence[tuple[int, int]], max_batch: int) -> Work:
    """All decode steps of requests of (prompt, new) tokens, at most `max_batch` at once.

    The first new token comes out of the prefill; at the step that makes token i + 1 the context is prompt + i long.
    """
    tokens = sum(new - 1 for _, new in lengths)
    steps = max(max(new for _, new in lengths) - 1, -(-tokens // max_batch))
    seen = sum((new - 1) * (prompt + new / 2) for prompt, new in lengths)
    flops = tokens * (_layer_flops(model) + _head_flops(model)) + _attention_flops(model, seen)
    return Work(steps * _weights(model, dtype, 0) + seen * kv_bytes_per_token(model, dtype), flops)


def _weights(model: ModelConfig, dtype: str, tokens: float) -> float:
    """Bytes of the weights that a step of `tokens` rows reads: of an untied input embedding only its rows."""
    unread = 0 if model.tie_word_embeddings else max(model.vocab_size - tokens, 0) * model.hidden_size
    return weight_bytes(model, dtype, on_cpu=False) - unread * itemsize(dtype)


def _layer_flops(model: ModelConfig) -> float:
    """All layers' matrix products, for one row."""
    q, kv = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    matrices = model.hidden_size * (2 * q + 2 * kv) + 3 * model.hidden_size * model.intermediate_size
    return 2 * model.num_hidden_layers * matrices


def _head_flops(model: ModelConfig) -> float:
    return 2 * model.hidden_size * model.vocab_size


def _attention_flops(model: ModelConfig, keys: float) -> float:
    """Scores and weighted sum over `keys` keys, all heads and layers."""
    return 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * keys
