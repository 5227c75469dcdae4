"""One decoder layer of Qwen3 in its two halves: up to the attended rows, and from there.

Between them rows may be left out, as nothing behind attention looks at another row. x [T, H] is what the previous block
adds to the residual stream [T, H]; the adds happen inside the norms. Knows the network; knows no weights' names beyond
a layer's and no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from max.graph import BufferValue, TensorValue

from mili.config import ModelConfig
from mili.ops.attention import CacheView, rope_attention
from mili.ops.feed_forward import feed_forward as fused_feed_forward
from mili.ops.linear import linear
from mili.ops.norm_linear import norm_linear, norm_linear_silu_mul

__all__ = ["Step", "attend", "feed_forward"]


@dataclass(frozen=True, slots=True)
class Step:
    """The values every layer reads."""

    cos_sin: TensorValue
    positions: TensorValue
    slots: TensorValue
    page_table: TensorValue
    query_starts: TensorValue
    seq_lens: TensorValue
    max_query_len: TensorValue
    max_seq_len: TensorValue
    k_cache: BufferValue
    v_cache: BufferValue
    exchange: BufferValue

    def values(self) -> list[TensorValue | BufferValue]:
        return [getattr(self, name) for name in Step.__slots__]


def attend(
    config: ModelConfig,
    weights: Mapping[str, TensorValue],
    x: TensorValue,
    residual: TensorValue,
    layer: TensorValue,
    step: Step,
    batch_invariant: bool,
) -> tuple[TensorValue, TensorValue]:
    """Write the step's keys and values to the cache; return attended rows [T, Hq*D] and the residual stream [T, H]."""
    # --8<-- [start:attend]
    head_dim, eps = config.head_dim, config.rms_norm_eps
    cache = CacheView(step.k_cache, step.v_cache, layer)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    qkv, residual = norm_linear(
        x,
        residual,
        weights["input_layernorm.weight"],
        weights["self_attn.qkv_proj.weight"],
        heads * head_dim,
        eps,
        weights.get("self_attn.qkv_proj.bias"),
        batch_invariant=batch_invariant,
    )
    q_norm, k_norm = weights["self_attn.q_norm.weight"], weights["self_attn.k_norm.weight"]
    attended = rope_attention(
        qkv,
        q_norm,
        k_norm,
        step.cos_sin,
        step.positions,
        step.slots,
        cache,
        step.page_table,
        step.query_starts,
        step.seq_lens,
        step.max_query_len,
        step.max_seq_len,
        eps,
        head_dim**-0.5,
        batch_invariant=batch_invariant,
    )
    return attended, residual
    # --8<-- [end:attend]


def feed_forward(
    config: ModelConfig,
    weights: Mapping[str, TensorValue],
    attended: TensorValue,
    residual: TensorValue,
    exchange: BufferValue,
    batch_invariant: bool,
) -> tuple[TensorValue, TensorValue]:
    """Return what the layer adds last and the residual stream before that, both [T, H]."""
    # --8<-- [start:feed_forward]
    if "self_attn.o_proj.bias" not in weights:
        return fused_feed_forward(
            attended,
            residual,
            weights["post_attention_layernorm.weight"],
            weights["self_attn.o_proj.weight"],
            weights["mlp.gate_up_proj.weight"],
            weights["mlp.down_proj.weight"],
            exchange,
            config.intermediate_size,
            config.rms_norm_eps,
            batch_invariant=batch_invariant,
        )
    x = linear(
        attended,
        weights["self_attn.o_proj.weight"],
        config.hidden_size,
        weights["self_attn.o_proj.bias"],
        batch_invariant=batch_invariant,
    )
    x, residual = norm_linear_silu_mul(
        x,
        residual,
        weights["post_attention_layernorm.weight"],
        weights["mlp.gate_up_proj.weight"],
        config.intermediate_size,
        config.rms_norm_eps,
        batch_invariant=batch_invariant,
    )
    x = linear(x, weights["mlp.down_proj.weight"], config.hidden_size, batch_invariant=batch_invariant)
    return x, residual
    # --8<-- [end:feed_forward]
